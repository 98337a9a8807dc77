"""Data and measurement: what passes learn from (the fit split), what judges them (the check split), and the yardsticks.

`dataset` reads questions about images and splits them by picture, `sources` knows the formats, `encode` makes batches
for the model with its own processor; `walk` streams the fit split through the model block by block and `stats` are the
running statistics taken there, `balance` how much visual tokens count in them; `judge` and `metrics` compare a model
with the original, `cost` says what it takes;
`workbench` ties all of this to one original model; `demo` is a small model with endless questions.
"""
