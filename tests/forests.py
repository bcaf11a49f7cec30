"""Random token trees."""

from hypothesis import strategies as st


@st.composite
def forests(draw, most_nodes=8, longest=5):
    """Nodes with random parents, whose tokens stand in any order."""
    count = draw(st.integers(1, most_nodes))
    lengths = [draw(st.integers(1, longest)) for _ in range(count)]
    parents = [draw(st.integers(-1, number - 1)) for number in range(count)]
    starts, end = {}, 0
    for number in draw(st.permutations(range(count))):
        starts[number], end = end, end + lengths[number]
    return [(starts[n], lengths[n], parents[n]) for n in range(count)]


def size(nodes):
    return sum(length for _, length, _ in nodes)
