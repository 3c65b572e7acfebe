"""Audits: what an attacker can really tell, against what is claimed.

Attacks, and what their scores prove, belong here; checks that every run makes of itself do
not (``training.verification``). Nothing below imports this room.
"""
