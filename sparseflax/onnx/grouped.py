"""Group normalization as PyTorch writes it: an InstanceNormalization between two reshapes, to groups of channels and back."""

from __future__ import annotations

from collections import Counter

from sparseflax.onnx.graph import Graph, Node


def grouped(graph: Graph) -> Graph:
    """The graph with each of these three, where nothing else takes what is between them, as one node."""
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    uses = Counter([*(name for node in graph.nodes for name in node.inputs), *graph.outputs])

    def before(node: Node, op: str, inputs: int) -> Node | None:
        """What makes the first input of a node, for it alone, if it is such a one."""
        maker = makers.get(node.inputs[0]) if node.inputs else None
        if maker is None or (maker.op, maker.domain, len(maker.inputs), len(maker.outputs)) != (op, "", inputs, 1):
            return None
        return maker if uses[node.inputs[0]] == 1 and not maker.attributes.get("allowzero") else None

    gone, made = set[str](), list[Node]()
    for node in reversed(graph.nodes):
        if node.outputs and gone.issuperset(node.outputs):
            continue
        is_last = (node.op, node.domain, len(node.inputs)) == ("Reshape", "", 2) and not node.attributes.get("allowzero")
        norm = before(node, "InstanceNormalization", 3) if is_last else None
        first = norm and before(norm, "Reshape", 2)
        if norm and first:
            gone |= {*norm.outputs, *first.outputs}
            inputs = (*first.inputs, *norm.inputs[1:], node.inputs[1])
            node = node._replace(op="GroupedInstanceNormalization", inputs=inputs, attributes=norm.attributes)
        made.append(node)
    return graph._replace(nodes=tuple(reversed(made)))
