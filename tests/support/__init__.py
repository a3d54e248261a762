"""What tests of several rooms share: data, networks, trainers, stops, comparisons."""
