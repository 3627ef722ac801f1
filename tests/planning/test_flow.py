"""What a collective moves: told by where its values come from and go, whatever their shapes are."""

import re

import pytest

from zoo.planning.collectives import grouped
from zoo.planning.hlo import Module

STEP = """HloModule jit_train_step, input_output_alias={ {0}: (0, {}, may-alias) }

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (w: f32[8,8], g: f32[8,8]) -> (f32[8,8], f32[8,8]) {
  %w = f32[8,8] parameter(0)
  %g = f32[8,8] parameter(1)
  %new = f32[8,8] subtract(%w, %g)
  %twice = f32[8,8] add(%g, %g)
  ROOT %both = (f32[8,8], f32[8,8]) tuple(%new, %twice)
}

%body (carry: (s32[], f32[8,8], f32[8,8])) -> (s32[], f32[8,8], f32[8,8]) {
  %carry = (s32[], f32[8,8], f32[8,8]) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  %inside = f32[8,8] get-tuple-element(%carry), index=1
  %kernel = f32[8,8] get-tuple-element(%carry), index=2
  %one = s32[] constant(1)
  %more = s32[] add(%count, %one)
  %looped = f32[8,8] all-reduce(%INLOOP), channel_id=4, replica_groups=[1,2]<=[2], to_apply=%add
  %product = f32[8,8] dot(%inside, %looped), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[8,8], f32[8,8]) tuple(%more, %product, %kernel)
}

%condition (carry: (s32[], f32[8,8], f32[8,8])) -> pred[] {
  %carry = (s32[], f32[8,8], f32[8,8]) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  %bound = s32[] constant(5)
  ROOT %again = pred[] compare(%count, %bound), direction=LT
}

ENTRY %main (p0: f32[8,8], p1: f32[8,8]) -> (f32[8,8], f32[]) {
  %p0 = f32[8,8] parameter(0), metadata={op_name="state.params['kernel']"}
  %p1 = f32[8,8] parameter(1), metadata={op_name="batch['images']"}
  %half = f32[4,8] slice(%FIRST), slice={[0:4], [0:8]}
  %gathered = f32[8,8] all-gather(%half), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8], f32[8,8]) tuple(%zero, %p1, %gathered)
  %loop = (s32[], f32[8,8], f32[8,8]) while(%start), condition=%condition, body=%body
  %out = f32[8,8] get-tuple-element(%loop), index=1
  %grad = f32[8,8] dot(%p1, %out), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %loss = f32[] reduce(%out, %nought), dimensions={0,1}, to_apply=%add
  %all = (f32[8,8], f32[], f32[8,8]) all-reduce(%grad, %loss, %out), channel_id=2, to_apply=%add
  %summed = f32[8,8] get-tuple-element(%all), index=0
  %mean = f32[] get-tuple-element(%all), index=1
  %partial = f32[8,8] get-tuple-element(%all), index=2
  %again = f32[8,8] dot(%p1, %partial), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %nought = f32[] constant(0)
  %moved = f32[8,8] all-gather(%out), channel_id=3, replica_groups=[1,2]<=[2], dimensions={0}
  %bias = f32[8] reduce(%moved, %nought), dimensions={0}, to_apply=%add
  %wide = f32[8,8] broadcast(%bias), dimensions={1}
  %both = f32[8,8] add(%summed, %wide)
  %pair = (f32[8,8], f32[8,8]) fusion(%p0, %both), kind=kLoop, calls=%fused
  %update = f32[8,8] get-tuple-element(%pair), index=0
  ROOT %result = (f32[8,8], f32[]) tuple(%update, %mean)
}

"""


def labels(text):
    return {
        (row.kind, row.what, row.count, row.bytes) for row in grouped(Module(text).collectives())
    }


def test_a_gathered_kernel_a_gradient_and_a_gathered_activation_of_one_shape():
    found = labels(STEP.replace("FIRST", "p0").replace("INLOOP", "kernel"))
    assert found == {
        ("all-gather", "parameters", 1, 256),  # on its way to the loop
        ("all-reduce", "parameters", 5, 1280),  # in the loop, of what the loop carries unchanged
        ("all-reduce", "parameters", 1, 256),  # the gradient
        ("all-reduce", "scalars", 1, 4),
        ("all-reduce", "activations", 1, 256),  # a product is made with it
        ("all-gather", "activations", 1, 256),  # it ends in the state, but summed over its rows
    }


@pytest.mark.parametrize(
    ("first", "in_loop", "expected"),
    [
        ("p1", "kernel", ("all-gather", "activations", 2, 512)),  # with the other gather
        ("p1", "kernel", ("all-reduce", "activations", 5, 1280)),  # what the loop carries is of it
        ("p0", "inside", ("all-reduce", "activations", 5, 1280)),
    ],
)
def test_the_same_collective_of_the_batch_is_an_activation(first, in_loop, expected):
    assert expected in labels(STEP.replace("FIRST", first).replace("INLOOP", in_loop))


def test_a_frozen_kernel_is_of_the_parameters_too():
    text = STEP.replace("FIRST", "p0").replace("INLOOP", "kernel")
    frozen = text.replace("state.params", "state.frozen")
    assert frozen != text and labels(frozen) == labels(text)


def test_without_names_of_arguments_nothing_is_taken_for_a_parameter():
    text = re.sub(", metadata={[^}]*}", "", STEP.replace("FIRST", "p0").replace("INLOOP", "kernel"))
    assert {what for _, what, _, _ in labels(text)} == {"activations", "scalars"}
