"""The parts of accelerate, in the order of use: copy, record, fold, survey, model, report."""
