"""The four papers of the suite, in their own names: slicegpt, svd_llm, afr, comp. None imports another."""
