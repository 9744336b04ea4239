"""Reading the codes: attention of queries over coded slices, and the merge of partial results."""
