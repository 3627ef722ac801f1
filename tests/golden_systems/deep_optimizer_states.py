"""AdamW by subgroups, and the schedule of the official loop."""

from collections.abc import Callable
from typing import Any

import golden
import jax.numpy as jnp
import numpy as np

from zoo.methods import offload


def build(case: golden.Case) -> tuple[Any, Callable[[dict], golden.Outputs]]:
    """By what the case has."""
    if "cases" in case.config.entries:
        cases = case.config.take("cases")
        return None, lambda _: {
            k: v for n, stride in cases for k, v in _schedule(n, stride).items()
        }
    return None, _adamw(case)


def _schedule(count: int, stride: int) -> golden.Outputs:
    plan, name = offload.schedule(count, stride), f"n{count}_k{stride}"
    return {
        f"{name}_decision": np.array(plan.decisions),
        f"{name}_flush_prefetch": np.array(plan.rounds),
        f"{name}_downcast_submit": np.array(plan.casts),
        f"{name}_left_cpu": np.array(plan.left_host or (-1,)),
        f"{name}_left_gpu": np.array([plan.left_device]),
    }


def _adamw(case: golden.Case) -> Callable[[dict], golden.Outputs]:
    config = case.config
    size, count, steps = config.take("n"), config.take("subgroups"), config.take("steps")
    optimizer = offload.AdamW(
        config.take("lr"),
        config.take("b1", 0.9),
        config.take("b2", 0.999),
        config.take("eps", 1e-8),
        config.take("wd", 0.0),
    )
    stride = config.take("k")
    machine = config.take("model", {})
    start = case.uniform("p", (size,))
    gradients = [case.uniform(f"g{t + 1}", (size,)) for t in range(steps)]
    case.unread("g<t>")

    def run(_: dict) -> golden.Outputs:
        ways = [None, 2, 3] if stride is None else [stride]
        results = []
        for way in ways:
            state, every = offload.init(jnp.asarray(start), count), []
            for gradient in gradients:
                state = offload.update(optimizer, jnp.asarray(gradient), state, way)
                every.append(np.concatenate(state.params))
            results.append(
                (np.stack(every), np.concatenate(state.first), np.concatenate(state.second))
            )
        for other in results[1:]:  # every way is compared with the reference, by being the same
            for a, b in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(a, b)
        out = dict(zip(("params", "m", "v"), results[0], strict=True))
        out["bounds"] = np.array(offload.bounds(size, count))
        if machine:
            names = dict(device="U_g", host="U_c", link="B", cast="D_c", group="S", count="n_sub")
            speeds = offload.Speeds(**{ours: machine[theirs] for ours, theirs in names.items()})
            rows = case.header["outputs"].get("stride_time", {"shape": [9, 2]})["shape"][0]
            out |= {
                "t_gpu_subgroup": np.array([speeds.device_time]),
                "t_cpu_subgroup": np.array([speeds.host_time]),
                "k": np.array([speeds.stride]),
                "t_all_cpu": np.array([speeds.time()]),
                "stride_time": np.array([(k, speeds.time(k)) for k in range(2, 2 + rows)]),
            }
        return out

    return run


def made_by(case: golden.Case) -> bool:
    """Whether the header names the repository, or subgroups."""
    return "DataStates" in case.source or "subgroups" in case.config.entries
