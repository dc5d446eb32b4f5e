"""The batch engine behind `feast materialize`: from offline Arrow straight to the online write, columnar and in chunks.

    batch_engine:
      type: headrace.engine.HeadraceEngine

Views that it cannot take whole (a transformation or aggregation of Feast's own, a history in another kind of source or
in another offline store) go through Feast's local engine, from which this one derives.
"""

from __future__ import annotations

from typing import Any, Literal

from feast import FeatureStore, FeatureView
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine, LocalComputeEngineConfig
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry

from headrace import progress
from headrace.contract import ViewContract
from headrace.materialize import materialize_window
from headrace.offline import HeadraceOfflineStore, is_parquet
from headrace.scan import Window


class HeadraceEngineConfig(LocalComputeEngineConfig):
    """Configuration of `HeadraceEngine`; the fields are those of Feast's local engine, for the views left to it."""

    type: Literal["headrace.engine.HeadraceEngine"] = "headrace.engine.HeadraceEngine"  # type: ignore[assignment]


class HeadraceEngine(LocalComputeEngine):
    """Materialize the newest row of each key within the window, both ends inclusive, in the order that it has offline.

    Memory is bounded by the offline store's `memory_limit`. A failing write fails the materialization, and Feast then
    records no interval. Idempotent; safe beside a running stream where the online store is one of ours.
    """

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        view = task.feature_view
        if not self._takes(view):
            return super()._materialize_one(registry, task, **kwargs)
        name = f"{view.name}-{task.start_time}-{task.end_time}"
        window = Window(task.start_time, task.end_time)
        # Not by Feast's own bar, which fills logs with control characters.
        progress.install()
        try:
            with progress.shown(f"materialize {view.name}") as meter:
                meter.say("looking for the newest rows")
                store, contract = FeatureStore(config=self.repo_config), ViewContract.from_feast(view, self.repo_config)
                materialize_window(
                    store, contract, window, progress=lambda done, total: meter.update(done, total, "keys")
                )
        except Exception as error:  # noqa: BLE001 - Feast raises what the job holds
            return LocalMaterializationJob(name, MaterializationJobStatus.ERROR, error)
        return LocalMaterializationJob(name, MaterializationJobStatus.SUCCEEDED)

    def _takes(self, view: Any) -> bool:
        """Whether a view is plain rows of a folder of Parquet files, read by our offline store."""
        if type(view) is not FeatureView or view.source_views or view.enable_validation:
            return False
        return isinstance(self.offline_store, HeadraceOfflineStore) and is_parquet(view.batch_source)
