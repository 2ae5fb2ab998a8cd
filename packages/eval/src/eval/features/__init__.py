"""Feature extractors: pictures to the vectors that distribution metrics compare."""
