"""What mechanisms compute with: pure functions of numbers and trees.

A formula that only mechanisms use belongs here; a plan, its accounting and its noise do
not (the files above).
"""
