"""``eqat train`` as a whole: what will be done, on which data, the stages in turn, and what they leave behind."""
