"""Linear models: logistic regression, TF-IDF, and the baseline and the start that they give."""
