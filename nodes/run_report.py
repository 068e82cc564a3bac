"""What a run did, read from the latent that came out of it."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import run_record


class RunReport(io.ComfyNode):
    """Passes a sampled latent on and tells what the effects did while it was sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RunReport",
            display_name="Run Report",
            category="concept",
            description=(
                "Put it behind a sampler: it tells in how many steps and model calls each effect of Concept Nodes acted, and at which "
                "noise levels. The latent passes through untouched."
            ),
            search_aliases=["report", "debug", "steps active", "model calls", "sigma", "inspect"],
            inputs=[io.Latent.Input("latent", tooltip="The latent as it leaves the sampler (either output). Passed on unchanged.")],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The same latent."),
                io.String.Output("report", display_name="report", tooltip="Steps, model calls and noise levels, for each effect."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        record = run_record.find(latent["samples"])
        report = record.describe() if record else missing()
        return io.NodeOutput(latent, report, ui=ui.PreviewText(report))


def missing() -> str:
    return (
        "No effect of Concept Nodes is known to have acted on this latent. Either none was on the model (strength 0, an empty window and "
        "no file do nothing), or the latent was changed after sampling, or it was sampled before the host was started, or more than "
        f"{run_record.KEPT} runs ago. Connect this node straight to the sampler, or sample again with another seed. Effects that are only "
        "on the negative model of DualModelGuider act, but no record of them is kept."
    )


NODES = [RunReport]
