"""The reproducibility suite: runs, results, profiles, clusters, exercises, site, slides, and the papers' printed numbers."""
