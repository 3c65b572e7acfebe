"""The engines, a file each: ``(loss, query, batch, key) -> (ClippedSum, PerExample)``.

Only what tells one engine from the others belongs here; what they share does not
(``execution``).
"""
