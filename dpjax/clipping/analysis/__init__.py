"""What the jaxpr of a one-example loss says: each use of each parameter, and of which kind.

Whatever is known before there is a batch belongs here; what computes with one does not
(``arithmetic``, ``execution``).
"""
