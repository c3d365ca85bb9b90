"""What devices watch of the data that goes through a model, and what the counts of it say.

A release may carry a *reference*: how the tensors of its publisher's samples were distributed (`reference`), made once
(`making`). A device counts a few elements of some requests in the reference's own bins (`sketching`); such a *sketch*
holds counts only, so sketches of windows and devices add up in any order (`sketch`). Whether a sketch comes from
another distribution than the reference is judged here (`drift`), and so is what labelled answers say (`accuracy`). No
IO, no clock, no sample of anybody's data.
"""
