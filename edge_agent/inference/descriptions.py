"""What the server says about itself and its models: metadata, configuration, statistics, repository index.

Pure functions from `Served` to the JSON documents of the Open Inference Protocol V2 and of Triton's extensions
"Model Configuration", "Statistics" and "Model Repository". A model's versions are the releases that can answer now.
"""

from collections.abc import Sequence
from importlib.metadata import version as distribution_version
from typing import Any

from common.artifact import TensorSpec
from edge_agent.inference.loaded import Statistics
from edge_agent.inference.serving import Served

Document = dict[str, Any]

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
_TRITON_TYPES = {"BYTES": "TYPE_STRING"}


def server_metadata() -> Document:
    """GET /v2"""
    return {"name": "edgeferry", "version": distribution_version("edgeferry"), "extensions": EXTENSIONS}


def model_metadata(served: Served, versions: Sequence[str], platform: str) -> Document:
    """GET /v2/models/{model}"""
    return {
        "name": served.model,
        "versions": versions,
        "platform": platform,
        "inputs": served.inputs,
        "outputs": served.outputs,
    }


def model_config(served: Served, platform: str) -> Document:
    """GET /v2/models/{model}/config. `max_batch_size` 0 means that shapes are sent as they are declared."""
    return {
        "name": served.model,
        "platform": platform,
        "backend": platform.removesuffix("_onnx"),
        "max_batch_size": 0,
        "version_policy": {"specific": {"versions": [served.version]}},
        "input": [_config_tensor(spec) for spec in served.inputs],
        "output": [_config_tensor(spec) for spec in served.outputs],
    }


def model_statistics(served: Sequence[Served]) -> Document:
    """GET /v2/models/stats and below it. Inferences are requests, executions are runs of the engine.

    As in Triton, answers from memory are successes and no inferences.
    """
    return {"model_stats": [_statistics(one) for one in served]}


def repository_index(served: Sequence[Served]) -> list[Document]:
    """POST /v2/repository/index"""
    return [{"name": one.model, "version": one.version, "state": "READY", "reason": _standing(one)} for one in served]


def _standing(served: Served) -> str:
    if not served.in_memory:
        return "not in memory; a request loads it"
    if not served.probation:
        return ""
    return "in probation" if served.current else "stands by while its successor is in probation"


def _config_tensor(spec: TensorSpec) -> Document:
    datatype = _TRITON_TYPES.get(spec.datatype, f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": datatype, "dims": spec.shape}


def _statistics(served: Served) -> Document:
    counts = served.statistics
    return {
        "name": served.model,
        "version": served.version,
        "last_inference": round(counts.last_at * 1000),
        "inference_count": counts.answered,
        "execution_count": sum(runs.count for runs in counts.runs),
        "inference_stats": _durations(counts),
        "batch_stats": [
            {
                "batch_size": runs.rows,
                "compute_input": _duration(runs.count, 0),
                "compute_infer": _duration(runs.count, runs.seconds),
                "compute_output": _duration(runs.count, 0),
            }
            for runs in counts.runs
        ],
    }


def _durations(counts: Statistics) -> Document:
    return {
        "success": _duration(counts.answered + counts.hits, counts.answered_s + counts.hit_s),
        "fail": _duration(counts.failed, counts.failed_s),
        "queue": _duration(counts.answered, counts.queue_s),
        "compute_input": _duration(counts.answered, 0),
        "compute_infer": _duration(counts.answered, counts.compute_s),
        "compute_output": _duration(counts.answered, 0),
        "cache_hit": _duration(counts.hits, counts.hit_s),
        "cache_miss": _duration(counts.misses, counts.miss_s),
    }


def _duration(count: int, seconds: float) -> Document:
    return {"count": count, "ns": round(seconds * 1e9)}
