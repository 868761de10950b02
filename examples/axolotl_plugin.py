"""A plugin of Axolotl: our attention by its name, documents of a packed row kept apart, memory patches.

    PYTHONPATH=examples axolotl train config.yaml

with these lines in config.yaml (docs/tools.md says why each is needed):

    plugins:
      - axolotl_plugin.FlashMLAPlugin
    attn_implementation: flashmla
    sample_packing: true
    gradient_checkpointing: false
"""

from axolotl.integrations.base import BasePlugin
from axolotl.utils.schemas import config as schema

import flashmla_hf


class FlashMLAPlugin(BasePlugin):
    def register(self, cfg: dict) -> None:
        """Before the configuration is checked: Axolotl knows neither our name, nor that packed rows are safe with it."""
        schema.CANONICAL_ATTN_IMPLS |= {"flashmla"}
        schema.ATTN_IMPLS_SUPPORTING_PACKING |= {"flashmla"}

    def post_model_load(self, cfg, model) -> None:
        """After the adapter, if there is one, and before the trainer."""
        flashmla_hf.patch(model)
        print(flashmla_hf.patch_report(model))
