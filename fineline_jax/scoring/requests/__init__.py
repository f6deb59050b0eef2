"""From a suite to a request pack: lm-eval's tasks, their documents, gold solutions."""
