"""A small real vision-language model with real questions: the bed on which this library's claims are measured.

model.py builds it, data.py reads easy-VQA, evaluate.py scores it, train.py is how its weights were made.
"""
