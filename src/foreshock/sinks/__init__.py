"""A run's records in the tools where people look at runs: thin adapters over their own clients.

Each client is an optional package, imported when its sink is made.
"""

from foreshock.sinks.feed import SinkFeeds
from foreshock.sinks.mlflow import MLflow
from foreshock.sinks.opentelemetry import OpenTelemetry
from foreshock.sinks.prometheus import Prometheus
from foreshock.sinks.sink import Sink
from foreshock.sinks.tensorboard import TensorBoard
from foreshock.sinks.wandb import WandB

__all__ = [
    "MLflow",
    "OpenTelemetry",
    "Prometheus",
    "Sink",
    "SinkFeeds",
    "TensorBoard",
    "WandB",
]
