"""From log-likelihoods to metrics: per document, over documents, with standard errors."""
