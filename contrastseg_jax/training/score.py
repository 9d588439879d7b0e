"""Evaluation during training; a failure does not stop the run."""

from pathlib import Path

import jax

from contrastseg_jax import out_of_memory
from contrastseg_jax.errors import best_effort, reason
from contrastseg_jax.evaluation.evaluate import Evaluator, evaluate
from contrastseg_jax.parallel import processes, sharding
from contrastseg_jax.parallel.processes import StopRequests
from contrastseg_jax.report import curves
from contrastseg_jax.run.board import Board, evaluation_pictures, write_metrics
from contrastseg_jax.run.logging import log
from contrastseg_jax.run.workdir import evaluation_folder, has_stalled
from contrastseg_jax.structs import TrainState
from contrastseg_jax.weights.load import inference_variables


def score(
    evaluator: Evaluator,
    state: TrainState,
    step: int,
    *,
    workdir: Path,
    board: Board | None,
    requests: StopRequests,
) -> None:
    """Evaluate the state after `step` steps, and log the scores with the run's metrics.

    A failed evaluation is a warning.

    Raises:
        Stopped: in all processes, if one was asked to stop.
    """
    objective, mesh = evaluator.setup.objective, evaluator.setup.mesh
    try:
        variables = jax.device_put(inference_variables(state, objective), sharding.replicated(mesh))
        results = evaluate(
            evaluator,
            variables,
            step,
            folder=evaluation_folder(workdir, step),
            workdir=workdir,
            before_batch=lambda error: processes.stop_together(requests, error),
        )
    except processes.Stopped:
        raise
    except Exception as error:
        if processes.count() > 1 and not isinstance(error, processes.SharedError):
            raise  # the others wait for this one
        cause = out_of_memory.explanation(error) or reason(error)
        log.warning(f"step {step}: evaluation failed, training continues: {cause}")
        return
    if board:
        scores = {key: results[key] for key in ("mean_iou", "pixel_accuracy")}
        scores |= {f"iou_{name}": value for name, value in results["iou"].items()}
        numbers = {f"val/{key}": value for key, value in scores.items()}
        write_metrics(workdir, board, step, numbers, evaluation_pictures(workdir, step))
        with best_effort(str(workdir / "curves.png")):
            curves.save_curves(workdir / "curves.png", workdir / "metrics.jsonl")
        log.info(f"step {step}  val mIoU {results['mean_iou']:.4f}")


def is_early_end(workdir: Path, patience: int, step: int) -> bool:
    """Whether a run ends at `step`, as its scores have not risen: the same in all processes."""
    return processes.gather(str(has_stalled(workdir, patience, step)))[0] == "True"


def has_scores(workdir: Path, step: int) -> bool:
    """Whether a checkpoint was evaluated: the same answer in all processes."""
    is_there = (evaluation_folder(workdir, step) / "metrics.json").exists()
    return processes.gather(str(is_there))[0] == "True"
