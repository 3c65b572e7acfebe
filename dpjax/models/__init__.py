"""Models: pure functions of one example, built by ``dpjax.models.<file>:<builder>``.

Models, their losses and weights, and which parameters are trained belong here; nothing here
sees a batch.
"""
