"""A value that XLA for CPU computes once, however many read it.

    x = materialized(x + y)

Every fusion of XLA for CPU computes again whatever elementwise values it reads. In a deep residual
network each layer reads the sum of all branches below it, and in the backward pass that of all
above: work, program and compile time grow with the square of the depth. XLA drops
`lax.optimization_barrier` before it fuses; what it keeps is a call that may not be inlined. Here
that is a call of the identity, which costs no copy. On other platforms `materialized` is nothing.
"""

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func
from jaxtyping import Array

materialize_p = Primitive("materialize")
materialize_p.def_impl(lambda x: x)
materialize_p.def_abstract_eval(lambda x: x)
ad.deflinear2(materialize_p, lambda cotangent, _: [materialize_p.bind(cotangent)])
batching.defvectorized(materialize_p)


def materialized(x: Array) -> Array:
    """`x`; neither it nor its cotangent is computed twice in a program for a CPU."""
    return materialize_p.bind(x)


def _nothing(_: mlir.LoweringRuleContext, x: ir.Value) -> list[ir.Value]:
    return [x]


def _call(ctx: mlir.LoweringRuleContext, x: ir.Value) -> list[ir.Value]:
    """A call of the identity that is not inlined; of sizes that are known only."""
    if not x.type.has_static_shape:
        return [x]
    module = ctx.module_context.module
    identity = func.FuncOp(
        "materialize", ([x.type], [x.type]), ip=ir.InsertionPoint.at_block_begin(module.body)
    )
    identity.attributes["sym_visibility"] = ir.StringAttr.get("private")
    ctx.module_context.symbol_table.insert(identity)  # makes its name unique
    block = identity.add_entry_block()
    with ir.InsertionPoint(block):
        func.ReturnOp([block.arguments[0]])
    call = func.CallOp([x.type], ir.FlatSymbolRefAttr.get(identity.name.value), [x])
    attributes = ir.DictAttr.get({"inlineable": ir.StringAttr.get("false")})
    call.operation.attributes["mhlo.frontend_attributes"] = attributes
    return list(call.results)


mlir.register_lowering(materialize_p, _nothing)
mlir.register_lowering(materialize_p, _call, platform="cpu")
