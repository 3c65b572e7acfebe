"""Audits: what an attacker can really tell, against what is claimed."""
