"""What an attacker sees of each mechanism, and its releases simulated by the thousand.

Facts about a mechanism under attack belong here; what scores prove does not (``audit``).
"""
