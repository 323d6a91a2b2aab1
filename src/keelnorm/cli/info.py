"""The command `keelnorm info`: the kernels that run on this machine, and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from keelnorm.cli._shared.common_options import AsJson


def gather() -> dict[str, Any]:
    """Versions, machine, and every set of kernels with whether it runs here, and why."""
    import torch

    from keelnorm import memory
    from keelnorm.engine.kernels import registry
    from keelnorm.engine.kernels.cpu import autograd_node
    from keelnorm.measure.machine import describe

    machine = describe()
    return {
        "keelnorm": machine.keelnorm,
        "torch": machine.torch,
        "python": machine.python,
        "processor": machine.cpu,
        "system": machine.system,
        "cores": machine.cores,
        "threads": machine.threads,
        "active": machine.keelnorm_kernels,
        "chosen_by": registry.chosen_by(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "active_on_gpus": registry.active("cuda"),
        "node": autograd_node.missing() or "runs",
        "memory": memory.obstacle() or "can be reused",
        "kernels": [asdict(kernel) for kernel in registry.available()],
    }


def _on_gpus(facts: dict[str, Any]) -> str:
    if not facts["gpus"]:
        return "torch finds no GPU here."
    takes = "float32, float16 and bfloat16" if facts["active_on_gpus"] == "triton" else "floating-point"
    return f"{takes} on {', '.join(facts['gpus'])} runs on {facts['active_on_gpus']}."


def _node(facts: dict[str, Any]) -> str:
    return "runs" if facts["node"] == "runs" else f"is missing, Python's runs: {facts['node']}"


def info_command(as_json: AsJson = False) -> None:
    """List the kernels that run on this machine, the one in use, and why."""
    facts = gather()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"keelnorm {facts['keelnorm']}, torch {facts['torch']}, Python {facts['python']}\n"
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads; {facts['system']}",
        markup=False,
        highlight=False,
    )
    table = Table("kernels", "runs here", "what it is")
    for kernel in facts["kernels"]:
        used = kernel["name"] == facts["active"]
        table.add_row(
            f"[bold]{kernel['name']}[/] (in use)" if used else kernel["name"],
            "yes" if kernel["usable"] else "no",
            kernel["note"],
        )
    console.print(table)
    console.print(
        f"floating-point on the CPU runs on {facts['active']} ({facts['chosen_by']}).\n{_on_gpus(facts)}\n"
        f"Small tensors: autograd's node in C++ {_node(facts)}.\n"
        f"Memory of freed tensors (keelnorm.reuse_memory): {facts['memory']}.",
        markup=False,
        highlight=False,
    )
