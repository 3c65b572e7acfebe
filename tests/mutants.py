"""Plausible bugs of the privacy core and the loop; ``tests.mutation`` runs them.

A file that moves needs one edit here.
"""

from tests.mutation import Mutant

ACCOUNTING = "dpjax.privacy.accounting"
BOUNDS = "dpjax.privacy.bounds"
CHECKS = "dpjax.checks"
CHECKPOINT = "dpjax.training.checkpoint"
CORRELATED = "dpjax.mechanisms.mathematics.correlated"
DIFFERENCES = "dpjax.mechanisms.mathematics.differences"
DIRECTIONS = "dpjax.mechanisms.mathematics.directions"
ENTROPY = "dpjax.privacy.entropy"
EVALUATE = "dpjax.training.evaluate"
FEEDBACK = "dpjax.mechanisms.mathematics.feedback"
LEDGER = "dpjax.training.ledger"
NOISE = "dpjax.privacy.noise"
OPENING = "dpjax.training.opening"
PROCESSES = "dpjax.parallel.processes"
RECORDING = "dpjax.training.recording"
SAMPLING = "dpjax.privacy.sampling"
SENSITIVE = "dpjax.privacy.sensitive"
SHARDING = "dpjax.parallel.sharding"
STATE = "dpjax.training.state"
STEP = "dpjax.training.step"
TOEPLITZ = "dpjax.mechanisms.mathematics.toeplitz"
TRAIN = "dpjax.training.train"
TRANSFORMS = "dpjax.transforms"
EXECUTE = "dpjax.clipping.execution.execute"
FACTORS = "dpjax.clipping.arithmetic.factors"
GATHERING = "dpjax.parallel.gathering"
HOOKS = "dpjax.clipping.execution.hooks"
ISOLATION = "dpjax.clipping.execution.isolation"
KERNELS = "dpjax.clipping.arithmetic.kernels"
KEYS = "dpjax.clipping.execution.keys"
LAYERED = "dpjax.clipping.execution.layered"
LAYOUTS = "dpjax.clipping.arithmetic.layouts"
MICROBATCHED = "dpjax.clipping.engines.microbatched"
ROUNDING = "dpjax.clipping.arithmetic.rounding"
USES = "dpjax.clipping.analysis.uses"
VALUES = "dpjax.clipping.analysis.values"
VMAP = "dpjax.clipping.engines.vmap"
ADAPTIVE = "dpjax.mechanisms.adaptive_dp_sgd"
BAND_MF = "dpjax.mechanisms.band_mf"
BVR = "dpjax.mechanisms.diff2_bvr_l_sgd"
DICE = "dpjax.mechanisms.dice_sgd"
DIFF2 = "dpjax.mechanisms.diff2"
DP_SGD = "dpjax.mechanisms.dp_sgd"
DP_ZERO = "dpjax.mechanisms.dp_zero"
TWO_CHANNELS = "dpjax.mechanisms.privatized_error_feedback"
RECURSION = "dpjax.mechanisms.recursion"
SCHEDULED = "dpjax.mechanisms.scheduled_dp_sgd"
SPIDER = "dpjax.mechanisms.spider_boost"

_EXACT = (
    "contracts/test_exact_releases.py::test_release_is_the_sum_and_the_noise_of_its_key"
)
_SLOW_NOISE = "privacy/test_noise.py::test_noise_is_that_of_the_slow_reference"
_TAMPERED = (
    "contracts/test_mechanisms.py::test_a_sum_that_was_tampered_with_comes_out_as_nan"
)
_GAUSSIANS = "golden/test_epsilon.py::test_any_number_of_gaussians_is_one_gaussian"
_ROUNDING = "clipping/arithmetic/test_rounding.py"
_ROWS = f"{_ROUNDING}::test_norms_of_rows_allow_for_underflow_and_for_every_rounding"
_STAGES = (
    "clipping/arithmetic/test_rounding.py"
    "::test_sums_in_stages_are_whole_and_count_their_roundings"
)
_GRAM = (
    "clipping/arithmetic/test_rounding.py"
    "::test_norms_allow_for_sums_over_positions_in_any_order"
)
_COUNTED = (
    "contracts/test_zoo.py::test_engine_equals_per_example_gradients[bookkeeping-{}]"
)
_REPEAT = "mechanisms/test_recursion.py"
_EF = "mechanisms/test_error_feedback.py"

MUTANTS = [
    # Views of parameters that a loop counts through, and what is computed only once.
    Mutant(
        KERNELS,
        "return min(*part.right.shape[2:], *(x.shape[3] for x in part.left)) > 1",
        "return True",
        "clipping/execution/test_bound.py"
        "::test_the_product_of_two_vectors_is_not_said_to_be_computed_once",
    ),
    Mutant(
        VALUES,
        "turns = np.arange(loop.length)[:: -1 if reverse else 1]",
        "turns = np.arange(loop.length)",
        _COUNTED.format("reversed_scan_counts_and_hands_the_number_on"),
    ),
    Mutant(
        VALUES,
        "if where.ndim > 1 or not where.size or size > 1 or len(steps) > 1 or not steps[0]:",
        "if where.ndim > 1 or not where.size or size > 1:",
        _COUNTED.format("fori_loop_beyond_the_end_of_the_stack"),
    ),
    Mutant(
        USES,
        "carry[i] = constant(now(start) + step * loop.length)",
        "carry[i] = constant(now(start))",
        _COUNTED.format("reversed_scan_counts_and_hands_the_number_on"),
    ),
    Mutant(
        CHECKS,
        """        if "event" in vars(kind):
            return
""",
        "",
        "training/test_startup.py",
    ),
    # How norms allow for rounding.
    Mutant(
        ROUNDING,
        "return jnp.sqrt(self.squares + self.slack)",
        "return jnp.sqrt(self.squares)",
        "clipping/arithmetic/test_rounding.py::test_the_longest_norm_allows_for_slack",
    ),
    Mutant(
        ROUNDING,
        "    return jnp.where(jnp.isfinite(found), weights * ratio, 0.0)",
        "    return weights * ratio",
        "clipping/arithmetic/test_rounding.py::"
        "test_what_is_formed_anew_is_scaled_back_and_dropped_if_it_is_not_finite",
    ),
    Mutant(
        ROUNDING,
        "    slack = of_terms(count + 2, wide.dtype) * squares + lost",
        "    slack = of_terms(count + 2, wide.dtype) * squares",
        _ROWS,
    ),
    Mutant(
        ROUNDING,
        "    return jnp.sum(unmerged(parts), axis=1), inner + parts.shape[1]",
        "    return jnp.sum(unmerged(parts), axis=1), 1",
        _STAGES,
    ),
    Mutant(
        ROUNDING,
        "flat = jnp.pad(flat, ((0, 0), (0, missing)))",
        "flat = flat[:, : entries - entries % inner]",
        _STAGES,
    ),
    Mutant(
        KERNELS,
        "    roundings = 2 * sum(left.shape[-1] for left, _ in lengths) + 4",
        "    roundings = 4",
        _GRAM,
    ),
    Mutant(
        KERNELS,
        "    roundings = 3 * sum(map(_positions, parts)) + 8",
        "    roundings = 8",
        _GRAM,
    ),
    Mutant(
        KERNELS,
        "    return jnp.sqrt(part.offsets * squares(part.image)) * "
        "jnp.sqrt(squares(part.right))",
        "    return jnp.sqrt(squares(part.image)) * jnp.sqrt(squares(part.right))",
        "clipping/arithmetic/test_rounding.py::test_patches_that_are_not_cut_out_allow_for_no_less",
    ),
    Mutant(
        KERNELS,
        "    lost += tiny * sum(positions) ** 2",
        "    pass",
        "clipping/arithmetic/test_rounding.py::test_gram_norms_allow_for_products_that_underflow",
    ),
    Mutant(
        KERNELS,
        "                products.append(2 * product)",
        "                products.append(product)",
        "clipping/arithmetic/test_kernels.py::test_norms_and_sums_are_those_of_the_gradients",
    ),
    # From norms to factors, and who is clipped with whom.
    Mutant(
        FACTORS,
        "    keep = mask & finite",
        "    keep = mask",
        "contracts/test_engines.py::"
        "test_nonfinite_examples_are_zeroed_counted_and_harmless[nan-flat-bookkeeping]",
    ),
    Mutant(
        FACTORS,
        "            raw = jnp.where(bound < MIN_CLIP_NORM / 10, 0.0, raw)",
        "            pass",
        "contracts/test_engines.py::test_a_radius_where_squares_underflow_keeps_nothing",
    ),
    Mutant(
        FACTORS,
        "        return jnp.where(keep, raw * outer, 0.0)",
        "        return jnp.where(keep, raw, 0.0)",
        "contracts/test_engines.py::test_gradients_are_clipped_to_the_outer_norm_first",
    ),
    Mutant(
        FACTORS,
        "rest = jax.tree.map(lambda leaf: outer - leaf, weights)",
        "rest = jax.tree.map(lambda leaf: 1.0 - leaf, weights)",
        "contracts/test_engines.py::"
        "test_one_example_moves_the_residual_by_at_most_what_lies_between",
    ),
    Mutant(
        FACTORS,
        "bound = bound / jnp.sqrt(jnp.asarray(len(layers), total.dtype))",
        "bound = bound / jnp.sqrt(jnp.asarray(len(layers) - 1, total.dtype))",
        "contracts/test_engines.py::"
        "test_contribution_of_one_example_never_exceeds_the_clip_norm",
    ),
    Mutant(
        FACTORS,
        "raw = bound / (norms + AUTOMATIC_GAMMA)",
        "raw = bound / jnp.maximum(norms - AUTOMATIC_GAMMA, AUTOMATIC_GAMMA)",
        "contracts/test_engines.py::"
        "test_contribution_of_one_example_never_exceeds_the_clip_norm",
    ),
    Mutant(
        FACTORS,
        "    return jnp.sum(jnp.where(mask, halves, 0.0), dtype=jnp.float32)",
        "    return jnp.sum(halves, dtype=jnp.float32)",
        "mechanisms/test_adaptive_dp_sgd.py::"
        "test_padding_counts_as_nothing_so_one_example_moves_the_count_by_a_half",
    ),
    Mutant(
        VMAP,
        "    keep = mask & factors.finite",
        "    keep = mask",
        "contracts/test_engines.py::"
        "test_nonfinite_examples_are_zeroed_counted_and_harmless[nan-flat-vmap]",
    ),
    Mutant(
        VMAP,
        "axes=1, precision=jax.lax.Precision.HIGHEST)",
        "axes=1, precision=jax.lax.Precision.DEFAULT)",
        "clipping/arithmetic/test_kernels.py::test_the_reference_sums_in_full_precision",
    ),
    Mutant(
        MICROBATCHED,
        "            return total.merge(clipped), statistics",
        "            return clipped, statistics",
        "training/test_train.py::test_microbatches_change_the_sum_by_rounding_only",
    ),
    Mutant(
        EXECUTE,
        "    return jax.tree.map(lambda x: jnp.sum(x, axis=tuple(range(1, "
        "x.ndim))), norms)",
        "    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1)[:, 0], norms)",
        "contracts/test_zoo.py::test_engine_equals_per_example_gradients"
        "[ghost-scan_over_time_with_a_weight_for_each_step]",
    ),
    Mutant(
        ISOLATION,
        "        return jnp.where(_like(finite, out), out, jnp.nan), True",
        "        return out, True",
        "contracts/test_isolation.py::"
        "test_a_gradient_of_outputs_that_is_not_finite_is_kept_apart",
    ),
    Mutant(
        KEYS,
        "jax.random.fold_in(key, combined_fingerprint(x))",
        "jax.random.fold_in(key, combined_fingerprint(jax.tree.leaves(x)[0]))",
        "clipping/execution/test_keys.py::test_examples_that_differ_have_keys_that_differ",
    ),
    Mutant(
        KEYS,
        "jax.vmap(lambda x: jax.random.fold_in(key, combined_fingerprint(x)))(",
        "jax.vmap(lambda x: jax.random.fold_in(jax.random.key(0), "
        "combined_fingerprint(x)))(",
        "clipping/execution/test_keys.py::"
        "test_keys_follow_examples_wherever_they_are_and_change_with_the_step",
    ),
    # Noise.
    Mutant(
        NOISE,
        "    return jax.lax.bitcast_convert_type(exponent, jnp.float32) / 1024",
        "    return jax.lax.bitcast_convert_type(exponent, jnp.float32) / 4096",
        _SLOW_NOISE,
    ),
    Mutant(
        NOISE,
        "        return jnp.where(silent, leaf, rounded)",
        "        return jnp.where(silent, leaf, leaf + "
        "noise.astype(leaf.dtype) * (unit / _FINE).astype(leaf.dtype))",
        "privacy/test_noise.py::test_what_comes_out_is_a_multiple_of_the_grid_whatever_went_in",
    ),
    Mutant(NOISE, "(noise & 0xFFFF)", "(noise & 0xFF)", _SLOW_NOISE),
    Mutant(
        NOISE,
        "keys = fold_in(fold_in(key, step), stream)",
        "keys = fold_in(key, step + stream)",
        "privacy/test_noise.py::test_streams_of_one_step_differ " + _EXACT,
    ),
    Mutant(
        NOISE,
        "keys = fold_in(fold_in(key, step), stream)",
        "keys = fold_in(fold_in(key, step & 0xFFFFFF), stream)",
        _EXACT,
    ),
    Mutant(
        NOISE,
        "_SHARES = (math.cos(0.7), math.sin(0.7))",
        "_SHARES = (math.cos(0.7), math.sin(0.69))",
        _SLOW_NOISE,
    ),
    Mutant(
        NOISE,
        "return jnp.where(bits & 1 == 1, size, -size)",
        "return jnp.where(bits & 2 == 2, size, -size)",
        _SLOW_NOISE,
    ),
    Mutant(
        NOISE,
        "    total = opened(clipped, l2_bound=l2_bound)",
        "    total = clipped.total",
        "test_transforms.py::test_a_sum_clipped_further_out_is_not_released",
    ),
    Mutant(
        NOISE,
        "    return jax.lax.fori_loop(streams.start, streams.stop, add, total)",
        "    return jax.lax.fori_loop(0, len(streams), add, total)",
        "privacy/test_noise.py::test_several_streams_are_those_that_are_named",
    ),
    Mutant(
        NOISE,
        "silent = _bits(stddev) == 0",
        "silent = jnp.asarray(stddev, jnp.float32) < 1e-3",
        _EXACT + " privacy/test_noise.py",
    ),
    # Secrets.
    Mutant(
        ENTROPY,
        "    if seed is None:\n        return os.urandom(16)",
        "    seed = os.getpid() % 65536 if seed is None else seed",
        "privacy/test_noise.py::test_root_keys_from_the_os_hold_128_fresh_bits",
    ),
    Mutant(
        ENTROPY,
        'f"dpjax {purpose} {seed}"',
        'f"dpjax {seed}"',
        "privacy/test_entropy.py",
    ),
    Mutant(
        STATE,
        'loss_key=_key("loss", seed)',
        'loss_key=_key("loss", 0)',
        "training/test_train.py::test_secrets_from_the_os_differ_between_runs",
    ),
    Mutant(
        STATE,
        'entropy("sampling", seed=seed), np.uint32)',
        'entropy("sampling", seed=seed or 0), np.uint32)',
        "training/test_train.py::test_secrets_from_the_os_differ_between_runs",
    ),
    Mutant(
        OPENING,
        'root_key(run["seed"])',
        'root_key(run["seed"] or 0)',
        "training/test_train.py::test_secrets_from_the_os_differ_between_runs",
    ),
    Mutant(
        DIRECTIONS,
        "key = jax.random.fold_in(root, step)",
        "key = root",
        "mechanisms/test_dp_zero.py::"
        "test_directions_are_gaussian_and_depend_on_seed_step_and_leaf_alone",
    ),
    Mutant(
        PROCESSES,
        "multihost_utils.broadcast_one_to_all(leaf))",
        "leaf)",
        "parallel/test_processes.py::"
        "test_secrets_of_the_operating_system_are_those_of_the_first_process",
    ),
    # Seals.
    Mutant(
        SENSITIVE,
        "intact = sealed & (self.l2_bound == other.l2_bound)",
        "intact = sealed",
        "test_transforms.py::test_merging_sums_of_different_bounds_breaks_the_seal "
        "contracts/test_engines.py::test_sums_of_different_bounds_do_not_merge",
    ),
    Mutant(
        SENSITIVE,
        "    return (clipped.seal == _seal()) & (clipped.l2_bound <= bound)",
        "    return clipped.l2_bound <= bound",
        _TAMPERED,
    ),
    Mutant(
        SENSITIVE,
        "    return (clipped.seal == _seal()) & (clipped.l2_bound <= bound)",
        "    return clipped.seal == _seal()",
        "test_transforms.py::test_a_sum_clipped_further_out_is_not_released",
    ),
    Mutant(
        SENSITIVE,
        "    intact &= clipped.l2_bound == jnp.asarray(l2_bound, jnp.float32)",
        "    pass",
        _EF + "::test_a_sum_that_was_tampered_with_spoils_the_release",
    ),
    Mutant(
        SENSITIVE,
        "    intact &= clipped.outer_norm <= jnp.asarray(outer_norm, jnp.float32)",
        "    pass",
        _EF + "::test_a_sum_that_was_tampered_with_spoils_the_release " + _TAMPERED,
    ),
    Mutant(
        SENSITIVE,
        "sealed = (self.seal == _seal()) & (other.seal == _seal())",
        "sealed = self.seal == _seal()",
        "test_transforms.py::test_merging_cannot_mend_a_broken_seal",
    ),
    Mutant(
        SENSITIVE,
        "    intact = jnp.all(self.seal == _seal())",
        "    intact = jnp.any(self.seal == _seal())",
        "parallel/test_sharding.py::"
        "test_partial_sums_with_a_broken_seal_or_different_bounds_poison_their_sum",
    ),
    Mutant(
        SENSITIVE,
        "    if jnp.ndim(clipped.seal):",
        "    if False:",
        "parallel/test_sharding.py::test_partial_sums_are_not_released",
    ),
    # Sampling and what it lets the accountant assume.
    Mutant(
        SAMPLING,
        "key=seed, counter=[0, 0, 0, step]",
        "key=seed, counter=[0, 0, 0, step % 4096]",
        "contracts/test_sampling.py::test_no_step_of_a_long_run_draws_as_an_earlier_one",
    ),
    Mutant(
        SAMPLING,
        "        return math.ceil(steps / self.cycle)",
        "        return steps // self.cycle",
        "contracts/test_sampling.py::test_no_example_takes_part_more_often_than_is_said",
    ),
    Mutant(
        SAMPLING,
        "            dataset_size=num_examples + 1,",
        "            dataset_size=num_examples - 1,",
        "contracts/test_sampling.py::test_truncated_poisson_draws_what_is_accounted",
    ),
    Mutant(
        SAMPLING,
        "part = self.rest if step % self.period else self.first",
        "part = self.rest if (step + 1) % self.period else self.first",
        "contracts/test_sampling.py::"
        "test_periodic_poisson_draws_and_accounts_its_parts_in_turn",
    ),
    Mutant(
        SAMPLING,
        "        first = math.ceil(steps / self.period)",
        "        first = steps // self.period",
        "contracts/test_sampling.py::"
        "test_periodic_poisson_draws_and_accounts_its_parts_in_turn",
    ),
    Mutant(
        SAMPLING,
        "        return dp.SelfComposedDpEvent(sampled, steps)",
        "        return dp.SelfComposedDpEvent(sampled, max(steps - 1, 1))",
        "golden/test_epsilon.py::test_golden_poisson_gaussian",
    ),
    Mutant(
        SAMPLING,
        "        return math.ceil(steps / self._steps_per_epoch(num_examples))",
        "        return max(steps // self._steps_per_epoch(num_examples), 1)",
        "golden/test_epsilon.py::test_shuffled_batches_by_hand",
    ),
    Mutant(
        SAMPLING,
        "        members = parts[step % self.cycle]",
        "        members = parts[(step // 2) % self.cycle]",
        "contracts/test_sampling.py::test_cyclic_poisson_draws_what_is_accounted "
        "contracts/test_sampling.py::test_no_example_takes_part_more_often_than_is_said",
    ),
    Mutant(
        SAMPLING,
        "size = min(rng.binomial(num_examples, self.rate), self.capacity)",
        "size = min(rng.binomial(num_examples, self.rate), self.capacity + 1)",
        "contracts/test_sampling.py::test_truncated_poisson_draws_what_is_accounted",
    ),
    Mutant(
        SAMPLING,
        "order = _generator(seed, epoch).permutation(num_examples)",
        "order = _generator(seed, 0).permutation(num_examples)",
        "contracts/test_sampling.py::test_seeds_and_steps_draw_differently "
        "contracts/test_sampling.py::"
        "test_shuffled_fixed_shows_each_example_at_most_once_an_epoch",
    ),
    # Accounting.
    Mutant(
        BOUNDS,
        "    return min(usual, low) if low > 0 else usual",
        "    return min(usual, low)",
        "golden/test_epsilon.py::"
        "test_an_order_whose_divergence_is_rounded_to_nothing_does_not_make_it_free",
    ),
    Mutant(
        BOUNDS,
        "    return min(usual, low) if low > 0 else usual",
        "    return usual",
        "golden/test_epsilon.py::test_golden_noise_multiplier_of_epsilon_1000 "
        "golden/test_epsilon.py::test_large_epsilons_are_just_above_the_truth",
    ),
    Mutant(
        BOUNDS,
        "            squares += count / multiplier**2",
        "            squares += count / multiplier",
        "golden/test_epsilon.py::test_full_batch_equals_the_analytic_gaussian",
    ),
    Mutant(
        BOUNDS,
        "        case dp.PoissonSampledDpEvent(sampling_probability=1):",
        "        case dp.PoissonSampledDpEvent():",
        "golden/test_epsilon.py::test_golden_poisson_gaussian",
    ),
    Mutant(
        BOUNDS,
        "        case dp.PoissonSampledDpEvent(sampling_probability=1):",
        "        case dp.PoissonSampledDpEvent(sampling_probability=2):",
        _GAUSSIANS,
    ),
    Mutant(
        BOUNDS,
        "min(2e-5 * estimate, spread / 10)",
        "2e-5 * estimate",
        "golden/test_epsilon.py::test_losses_of_many_steps_are_told_apart_on_the_grid",
    ),
    Mutant(
        BOUNDS,
        "    if delta < LEAST_DELTA and not math.isnan(estimate):\n        return None\n",
        "",
        "golden/test_epsilon.py::test_where_pld_does_not_reach_the_bound_is_that_of_rdp",
    ),
    Mutant(
        BOUNDS,
        "_flat(event.event, count * event.count)",
        "_flat(event.event, event.count)",
        "golden/test_tuning_cost.py",
    ),
    Mutant(
        ACCOUNTING,
        '    if math.isnan(spent(named(_event(plan)), plan.delta, "pld")):',
        "    if False:",
        "golden/test_epsilon.py::"
        "test_an_event_that_no_accountant_knows_is_refused_by_calibration",
    ),
    Mutant(
        ACCOUNTING,
        "not 0 <= steps <= mechanism.steps:",
        "not 0 <= steps <= mechanism.steps + 1:",
        "contracts/test_mechanisms.py::test_steps_beyond_the_plan_have_no_epsilon",
    ),
    Mutant(
        ACCOUNTING,
        "[dp.SelfComposedDpEvent(plan.event, n) for plan, n in counts.items()]",
        "[plan.event for plan in counts]",
        "golden/test_tuning_cost.py",
    ),
    Mutant(
        ACCOUNTING,
        "event=plan.event, mean=runs, shape=shape",
        "event=plan.event, mean=1, shape=shape",
        "golden/test_tuning_cost.py",
    ),
    # Mechanisms.
    Mutant(
        DP_SGD,
        "        return self.noise_multiplier * self.clip_norm",
        "        return self.noise_multiplier",
        _EXACT
        + " contracts/test_mechanisms.py::test_noise_has_the_derived_scale_and_never_repeats",
    ),
    Mutant(
        SCHEDULED,
        "self.noise_multipliers[:steps]",
        "self.noise_multipliers",
        "mechanisms/test_scheduled_dp_sgd.py::"
        "test_every_step_costs_what_its_own_multiplier_costs",
    ),
    Mutant(
        SCHEDULED,
        "        return mean, StepState(state.step + 1)",
        "        return mean, StepState(state.step)",
        "mechanisms/test_scheduled_dp_sgd.py::"
        "test_every_step_is_clipped_and_noised_as_its_schedules_say",
    ),
    Mutant(
        SCHEDULED,
        "math.ceil(_LEVELS * math.log2(scale) - 1e-6)",
        "math.floor(_LEVELS * math.log2(scale) + 1e-6)",
        "mechanisms/test_scheduled_dp_sgd.py::"
        "test_multipliers_are_rounded_up_and_by_little",
    ),
    Mutant(
        ADAPTIVE,
        "moved = jnp.clip(moved, self.min_clip_norm, self.max_clip_norm)",
        "moved = jnp.maximum(moved, self.min_clip_norm)",
        "mechanisms/test_adaptive_dp_sgd.py::test_the_clip_norm_stays_within_its_bounds",
    ),
    Mutant(
        ADAPTIVE,
        "            stream=1,",
        "            stream=0,",
        "contracts/test_exact_releases.py::"
        "test_adaptive_noise_follows_the_clip_norm_of_the_step",
    ),
    Mutant(
        ADAPTIVE,
        "            stddev=self.noise_stddev(bound),",
        "            stddev=self.noise_stddev(self.initial_clip_norm),",
        "contracts/test_exact_releases.py::"
        "test_adaptive_noise_follows_the_clip_norm_of_the_step",
    ),
    Mutant(
        ADAPTIVE,
        '0.5 if self.sampling.adjacency == "add_or_remove_one" else 1.0',
        "0.5",
        "mechanisms/test_adaptive_dp_sgd.py::test_sum_and_count_together_cost_one_gaussian",
    ),
    Mutant(
        ADAPTIVE,
        "        count = add_noise(\n            opened_count(clipped, l2_bound=bound),",
        "        count = add_noise(\n            clipped.count,",
        "mechanisms/test_adaptive_dp_sgd.py::"
        "test_a_sum_clipped_for_another_step_spoils_the_clip_norm_too",
    ),
    Mutant(
        BAND_MF,
        "if isinstance(sampling, CyclicPoisson) else 1",
        "if isinstance(sampling, CyclicPoisson) else self.bands",
        "contracts/test_mechanisms.py::test_impossible_plans_are_refused",
    ),
    Mutant(
        TOEPLITZ,
        "    column /= np.linalg.norm(column)\n",
        "    column /= column.sum()\n",
        "mechanisms/mathematics/test_toeplitz.py::test_columns_have_norm_one_fall_and_give_a_stable_recursion",
    ),
    Mutant(
        CORRELATED,
        "    return noisy, CorrelatedNoiseState(step + 1, recent)",
        "    return noisy, CorrelatedNoiseState(step, recent)",
        "mechanisms/test_band_mf.py::"
        "test_strategy_times_noise_is_white_of_the_accounted_size",
    ),
    Mutant(
        CORRELATED,
        "stddev / column[0]}",
        "stddev}",
        "mechanisms/test_band_mf.py::"
        "test_strategy_times_noise_is_white_of_the_accounted_size",
    ),
    Mutant(
        CORRELATED,
        "        return jnp.where(state.count == step, -weighted, jnp.nan)",
        "        return -weighted",
        "mechanisms/test_band_mf.py::test_steps_in_the_wrong_order_are_not_released",
    ),
    Mutant(
        CORRELATED,
        "noise_like(old, **drawn))",
        "jax.tree.map(jnp.subtract, noisy, jax.tree.map(jnp.add, tree, old)))",
        "mechanisms/test_band_mf.py::test_noise_does_not_depend_on_the_sums",
    ),
    Mutant(
        FEEDBACK,
        "        lambda e, g, r: ((e - g) + r).astype(e.dtype),",
        "        lambda e, g, r: (e + r).astype(e.dtype),",
        _EF + "::test_golden_trajectory",
    ),
    Mutant(
        FEEDBACK,
        "    scaled = jax.tree.map(lambda e: e / unit, memory)",
        "    scaled = memory",
        "golden/test_error_feedback.py::test_automatic_clipping_of_gradients_and_memory "
        "test_transforms.py "
        "golden/test_error_feedback.py::"
        "test_the_transform_alone_is_the_mechanism_without_noise",
    ),
    Mutant(
        DICE,
        "                return 2 * self._error_bound + self.clip_norm",
        "                return self._error_bound + self.clip_norm",
        "golden/test_error_feedback.py::test_conservative_noise",
    ),
    Mutant(
        DICE,
        "(carried, carried + self.clip_norm), (1 - rate, rate)",
        "(0.0, carried + self.clip_norm), (1 - rate, rate)",
        "golden/test_error_feedback.py::test_conservative_noise",
    ),
    Mutant(
        DICE,
        "late = 2 * self._error_bound * math.sqrt(steps)",
        "late = self._error_bound * math.sqrt(steps)",
        "golden/test_error_feedback.py::test_k_participation_is_one_gaussian",
    ),
    Mutant(
        DICE,
        "        return jax.tree.map(lambda x: x / self.expected_batch_size, noisy), state",
        "        hidden = jax.tree.map(lambda e, v, n: e + v - n, "
        "state.memory, vector, noisy)\n"
        "        state = state._replace(memory=hidden)\n"
        "        return jax.tree.map(lambda x: x / self.expected_batch_size, noisy), state",
        _EF + "::test_noise_is_added_to_the_release_and_never_to_the_memory",
    ),
    Mutant(
        TWO_CHANNELS,
        "            stream=1,",
        "            stream=0,",
        "contracts/test_exact_releases.py::test_both_channels_have_noise_of_their_own",
    ),
    Mutant(
        TWO_CHANNELS,
        "        longest = self.outer_norm - self.clip_norm",
        "        longest = self.clip_norm",
        _EF
        + "::test_two_channels_cost_what_one_release_costs_and_no_less_noise_is_added",
    ),
    Mutant(
        RECURSION,
        "    restarts = math.ceil(rounds / mechanism.restart_every)",
        "    restarts = rounds // mechanism.restart_every",
        "golden/test_epsilon.py::test_golden_diff2",
    ),
    Mutant(
        RECURSION,
        "l2_bound=jnp.where(due, radius * (1 + _ROUNDING), jnp.nan)",
        "l2_bound=jnp.where(due, jnp.inf, jnp.nan)",
        _REPEAT + "::test_a_sum_of_another_difference_is_not_released",
    ),
    Mutant(
        RECURSION,
        "l2_bound=jnp.where(due, radius * (1 + _ROUNDING), jnp.nan)",
        "l2_bound=radius * (1 + _ROUNDING)",
        _TAMPERED,
    ),
    Mutant(
        RECURSION,
        "jnp.maximum(radius, clipped.l2_bound))",
        "jnp.minimum(radius, clipped.l2_bound) * 0.999)",
        _EXACT,
    ),
    Mutant(
        RECURSION,
        'ratio = {"restart": 1.0, "difference": mechanism.noise_ratio}[phase]',
        'ratio = {"restart": 1.0, "difference": 1.0}[phase]',
        "golden/test_epsilon.py::test_golden_diff2",
    ),
    Mutant(
        DIFF2,
        "math.sqrt(self.noisy_workers) * radius",
        "radius / math.sqrt(self.noisy_workers)",
        _EXACT,
    ),
    Mutant(
        DIFF2,
        "        return self.difference_clip_norm * recursion.moved(params, state)",
        "        return self.difference_clip_norm",
        _REPEAT + "::test_a_step_of_length_zero_leaves_the_estimate_as_it_is",
    ),
    Mutant(
        DIFFERENCES,
        "jnp.where(restart, u, u + v).astype(v.dtype)",
        "jnp.where(restart, u, u).astype(v.dtype)",
        "mechanisms/mathematics/test_differences.py::test_exact_differences_give_the_gradient_step_by_step",
    ),
    Mutant(
        SPIDER,
        "        return jnp.minimum(smooth, 2 * self.clip_norm)",
        "        return smooth",
        _REPEAT,
    ),
    Mutant(
        SPIDER,
        'return self.sampling.first if phase == "restart" else self.sampling.rest',
        "return self.sampling.rest",
        "golden/test_epsilon.py::test_golden_spider_boost",
    ),
    Mutant(
        BVR,
        "            return self.local_noise_ratio * self.noise_multiplier",
        "            return self.noise_multiplier",
        "mechanisms/test_bvr_l_sgd.py::"
        "test_every_release_of_fifty_is_accounted_by_its_noise_and_rate",
    ),
    Mutant(
        BVR,
        'self.sampling.rest if phase == "local" else self.sampling.first',
        "self.sampling.rest",
        "mechanisms/test_bvr_l_sgd.py::"
        "test_every_release_of_fifty_is_accounted_by_its_noise_and_rate",
    ),
    Mutant(
        DP_ZERO,
        "l2_bound=jnp.where(due, self.clip_norm, jnp.nan)",
        "l2_bound=self.clip_norm",
        "mechanisms/test_dp_zero.py::test_a_sum_along_the_direction_of_another_step_is_nan",
    ),
    # Release and optimizer.
    Mutant(
        TRANSFORMS,
        "        planned = state.step < mechanism.steps",
        "        planned = state.step <= mechanism.steps",
        "test_transforms.py::test_no_release_beyond_the_plan",
    ),
    Mutant(
        TRANSFORMS,
        "released=combined_fingerprint(mean)",
        "released=combined_fingerprint(out)",
        "test_transforms.py::test_flax_train_states_take_clipped_sums",
    ),
    Mutant(
        TRANSFORMS,
        "            step=state.step + 1,\n",
        "            step=jnp.minimum(state.step + 1, mechanism.steps - 1),\n",
        "test_transforms.py::test_no_release_beyond_the_plan",
    ),
    Mutant(
        TRANSFORMS,
        "            step=state.step,\n",
        "            step=state.step // 2,\n",
        "test_transforms.py::test_each_step_has_its_own_noise_and_fingerprint",
    ),
    Mutant(
        TRANSFORMS,
        "        restart = state.count % restart_every == 0\n",
        "        restart = state.count % restart_every == 1 % restart_every\n",
        "mechanisms/mathematics/test_differences.py::test_exact_differences_give_the_gradient_step_by_step",
    ),
    # The ledger, and guards of a resume.
    Mutant(
        LEDGER,
        "        elif known.fingerprint != fingerprint:",
        "        elif False:",
        "training/test_ledger.py",
    ),
    Mutant(
        LEDGER,
        "            if before != self._layout:",
        "            if False:",
        "training/test_ledger.py",
    ),
    Mutant(
        LEDGER,
        "for number in range(steps) if number",
        "for number in range(steps - 1) if number",
        "training/test_ledger.py",
    ),
    Mutant(
        LEDGER,
        "        return len(self._seen)",
        "        return max(self._seen, default=0)",
        "training/test_ledger.py "
        "training/test_train.py::test_a_card_written_while_replaying_tells_of_all_releases",
    ),
    Mutant(
        LEDGER,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "training/test_ledger.py",
    ),
    Mutant(
        LEDGER,
        "        if seen.setdefault(step, mark) != mark:",
        "        if seen.setdefault(step, mark) is None:",
        "training/test_ledger.py",
    ),
    Mutant(
        OPENING,
        "        ledger.check_complete(start)\n",
        "",
        "training/test_train.py::test_a_lost_ledger_is_no_permission",
    ),
    Mutant(
        OPENING,
        "    ledger.check_empty()\n",
        "",
        "training/test_train.py::test_lost_checkpoints_are_no_fresh_start",
    ),
    Mutant(
        OPENING,
        "        _check_same_run(before, identity, workdir)\n",
        "",
        "training/test_train.py::test_resume_on_changed_data_is_refused "
        "training/test_train.py::test_a_workdir_of_another_config_is_refused_with_the_keys",
    ),
    Mutant(
        OPENING,
        "        _check_same_frozen(before, identity, workdir)\n",
        "",
        "models/test_partition.py::"
        "test_a_run_starts_from_an_export_and_goes_on_with_the_same_weights_only",
    ),
    Mutant(
        CHECKPOINT,
        "        if self.latest is not None and step <= self.latest:",
        "        if False:",
        "training/test_checkpoint.py::test_wrong_arguments_are_refused",
    ),
    # The loop.
    Mutant(
        STEP,
        "    return optax.incremental_update(params, average, 1 - rate)",
        "    return optax.incremental_update(params, average, rate)",
        "training/test_train.py::test_the_moving_average_remembers_by_its_decay_and_little_at_first",
    ),
    Mutant(
        STEP,
        "        params = optax.apply_updates(state.params, updates)\n",
        "        params = optax.apply_updates(state.params, updates)\n        "
        "params = jax.tree.map(lambda p, t: p + (1e-9 * t).astype(p.dtype), "
        "params, total.total)\n",
        "contracts/test_taint.py::test_nothing_leaves_a_step_but_what_got_noise",
    ),
    Mutant(
        STEP,
        "        norm = optax.tree.norm(updates)",
        "        norm = optax.tree.norm(total.total)",
        "contracts/test_taint.py::test_nothing_leaves_a_step_but_what_got_noise",
    ),
    Mutant(
        STEP,
        "        sums, statistics = self.begin(phase, state), []\n        for "
        "chunk in batch.chunks:",
        "        sums, statistics = self.begin(phase, state), []\n        for "
        "chunk in batch.chunks[:1]:",
        "training/test_train.py::test_all_chunks_of_a_batch_are_in_its_sum",
    ),
    Mutant(
        STEP,
        "jax.random.fold_in(state.loss_key, state.private.step)",
        "state.loss_key",
        "training/test_train.py::test_every_step_has_randomness_of_its_own_in_the_loss",
    ),
    Mutant(
        STEP,
        "        asked = dataclasses.replace(asked, clip_norm=total.l2_bound)\n",
        "",
        "training/test_difference_runs.py::"
        "test_all_chunks_of_a_step_are_clipped_to_the_radius_of_its_empty_sum",
    ),
    Mutant(
        STATE,
        "jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))",
        "jnp.array(leaf)",
        "training/test_containers.py",
    ),
    Mutant(
        TRAIN,
        "evaluate(params, experiment.held_out)\n                writer",
        "evaluate(params, experiment.source)\n                writer",
        "training/test_train.py::test_what_is_told_of_a_run_is_measured_on_the_held_out_data",
    ),
    Mutant(
        TRAIN,
        "card_at(max(accounted, ledger.releases))",
        "card_at(accounted)",
        "training/test_train.py::test_a_card_written_while_replaying_tells_of_all_releases",
    ),
    Mutant(
        TRAIN,
        "                record(ledger, released)\n                unrecorded = None\n",
        "                unrecorded = None\n",
        "training/test_train.py::test_a_crash_between_two_writes_leaves_no_understated_card "
        "training/test_train.py::test_a_lost_ledger_is_no_permission "
        "training/test_train.py::test_resume_after_a_crash_is_bitwise_the_undisturbed_run",
    ),
    Mutant(
        TRAIN,
        "            start=start,\n            rows",
        "            start=0,\n            rows",
        "training/test_train.py::test_resume_after_a_crash_is_bitwise_the_undisturbed_run",
    ),
    Mutant(
        RECORDING,
        "ahead = (-(-step // every) * every",
        "ahead = (step // every * every",
        "training/test_train.py::test_between_evaluations_more_is_accounted_than_was_released",
    ),
    Mutant(
        RECORDING,
        "        return Pause(score, save, accounted=step)",
        "        return Pause(score, save, accounted=step - 1)",
        "training/test_recording.py",
    ),
    Mutant(
        EVALUATE,
        "jnp.sum(jnp.where(batch.mask, values, 0.0))[None]",
        "jnp.sum(values)[None]",
        "training/test_evaluate.py",
    ),
    # Devices and processes.
    Mutant(
        SHARDING,
        "            check_vma=False,",
        "            check_vma=True,",
        "parallel/test_sharding.py::test_each_example_is_in_the_sum_exactly_once",
    ),
    Mutant(
        SENSITIVE,
        "            lambda x: jnp.sum(x, axis=0), (self.total, self.residual, self.count)",
        "            lambda x: jnp.sum(x, axis=0) / x.shape[0], (self.total, "
        "self.residual, self.count)",
        "parallel/test_sharding.py::test_the_sum_of_partial_sums_is_what_merging_them_gives",
    ),
    Mutant(
        SHARDING,
        '            in_specs=(_WHOLE, PartitionSpec("data")),',
        "            in_specs=(_WHOLE, _WHOLE),",
        "parallel/test_sharding.py::test_each_example_is_in_the_sum_exactly_once",
    ),
    # Layouts: parts of sums and of norms, on devices that share rows or products.
    Mutant(
        GATHERING,
        "lambda local: jax.lax.psum(function(local), FSDP)",
        "lambda local: jax.lax.pmean(function(local), FSDP)",
        "parallel/test_sharding.py::test_every_engine_sums_the_same_on_every_mesh",
    ),
    Mutant(
        GATHERING,
        "lambda local: jax.lax.psum(function(local), FSDP)",
        "lambda local: function(local)",
        "parallel/test_sharding.py::test_every_engine_sums_the_same_on_every_mesh",
    ),
    Mutant(
        SHARDING,
        '            axis_names={"data"} if self.split else {*AXES},',
        "            axis_names={*AXES},",
        "parallel/test_sharding.py::"
        "test_a_step_reduces_over_replicas_once_and_moves_no_examples",
    ),
    Mutant(
        STEP,
        "sums = query(phase, state).empty().stacked(layout.replicas)",
        "sums = query(phase, state).empty().stacked(layout.row_parts)",
        "parallel/test_sharding.py::test_every_mesh_trains_the_same_parameters",
    ),
    Mutant(
        LAYERED,
        "    squares, slack = (jnp.sum(x, axis=0) for x in each)",
        "    squares, slack = (jnp.max(x, axis=0) for x in each)",
        "clipping/execution/test_layered.py",
    ),
    Mutant(
        LAYERED,
        "lambda turn: kernels.weighted_rows(turn, weights), _turns(rows, loops)",
        "lambda turn: turn.sum(axis=0), _turns(rows, loops)",
        "clipping/execution/test_layered.py",
    ),
    Mutant(
        HOOKS,
        "return g, None, layouts.weight_gradient(inner, kernels.gradients(parts))[0]",
        "return g, None, 0.9 * layouts.weight_gradient("
        "inner, kernels.gradients(parts))[0]",
        "clipping/execution/test_layered.py",
    ),
    Mutant(
        LAYOUTS,
        '    moved = jnp.moveaxis(parts, axis, axis + (1 if side == "k" else 2))',
        "    moved = jnp.moveaxis(parts, axis, axis + 1)",
        "parallel/test_sharding.py::"
        "test_norms_of_divided_weights_cost_one_number_of_each_example",
    ),
    Mutant(
        LAYOUTS,
        '    blocks = (site.blocks, 1) if side == "k" else (1, site.blocks)',
        '    blocks = (1, site.blocks) if side == "k" else (site.blocks, 1)',
        "parallel/test_sharding.py::"
        "test_norms_of_divided_weights_cost_one_number_of_each_example",
    ),
    Mutant(
        "dpjax.training.memory",
        "    if need.total <= limit:\n        return need",
        "    if True:\n        return need",
        "training/test_memory.py",
    ),
    Mutant(
        ROUNDING,
        "        return rest, shape[-1] + entries // max(shape[-1], 1)",
        "        return rest, 1",
        "parallel/test_sharding.py::"
        "test_norms_of_rows_on_several_devices_are_never_too_small",
    ),
    Mutant(
        "dpjax.training.verification.verify",
        "    for index, row in ((0, 0), (len(source) // 2, size - 1)):",
        "    for index, row in ((0, 0), (len(source) // 2, 0)):",
        "training/verification/test_verify.py",
    ),
]
