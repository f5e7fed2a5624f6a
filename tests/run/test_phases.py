"""From SFT to RL with adapters: what becomes of them."""

import types

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from steptool_jax.policy import lora, model, sharding
from steptool_jax.run.parts import build


def test_the_reference_of_rl_is_the_policy_after_sft():
  """Adapters of SFT are merged, so that "adapters off" is what RL starts from."""
  settings = lora.Lora(rank=2, alpha=8.0, targets=("q", "down"))
  config = lora.with_lora(fakes.tiny_config(), settings)
  params = model.init_params(config, jax.random.key(0))
  trained = jax.tree.map(lambda x: x + 0.1, lora.init_lora(config, settings, jax.random.key(1)))
  policy = types.SimpleNamespace(model=config, lora=settings)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  variables = {"params": params, "lora": trained}
  folded = build.fold_adapters(tiny.make(), policy, mesh, variables)

  @jax.jit
  def hidden(variables):
    ids = jnp.arange(12)[None]
    return model.forward(config, variables, ids, ids, jnp.ones_like(ids))

  expected = hidden(variables)
  np.testing.assert_allclose(hidden(folded), expected, atol=1e-4)
  np.testing.assert_allclose(hidden(lora.adapters_off(folded)), expected, atol=1e-4)
  assert float(jnp.abs(hidden(lora.adapters_off(variables)) - expected).max()) > 0.01
  adapter = folded["lora"]["layers"]["q"]
  assert np.any(adapter["a"]), "RL could not learn"
  assert not np.any(adapter["b"])
