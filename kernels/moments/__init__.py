"""Two passes over rows that several losses share: their mean and scatter, and a linear map of x − μ."""
