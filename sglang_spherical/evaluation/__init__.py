"""Measures what the codes cost a model.

coding      keys and values through the codes of a tier, level by level as the server's pages go
attention   a Hugging Face model whose attention reads coded keys and values
comparators other codecs, through the same attention
gradients   what errors of every slice are expected to do to the predictions, by pattern
inputs      a model directory and a text, checked, as model and windows of tokens
scores      what is measured of each run, summed over windows
report      the JSON file, the table and the plot
"""
