"""What is computed: the LongCat-Flash model. Knows no process group, no file and no flag."""
