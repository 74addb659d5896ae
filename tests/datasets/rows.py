"""What the splits of a text data set hold."""

SPLITS = ["train", "validation", "test"]


def sizes(data):
    assert list(data.splits) == SPLITS
    return tuple(len(data.splits[s]) for s in SPLITS)


def everything(data, column):
    return [value for s in SPLITS for value in data.splits[s][column]]


def assert_same(a, b):
    assert {s: a.splits[s].to_list() for s in SPLITS} == {s: b.splits[s].to_list() for s in SPLITS}
