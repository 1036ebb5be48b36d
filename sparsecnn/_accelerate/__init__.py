"""What accelerate is made of, in the order it is used: copy, record, fold, survey, model, report."""
