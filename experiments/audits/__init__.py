"""What attacks are run on, and the tables that come of it.

Plans, suites and pages of audits belong here; the attacks do not (``dpjax.audit``).
"""
