// What a tape keeps for the backward pass. A tensor that is cheap to make is not kept but made again, from what is kept anyway: the
// output of a norm costs one pass over memory, and would be a sixth of all activations.
import { addUse, releaseUse, type Tensor } from './tensor.ts';

/** How to make a tensor again. */
export interface Recipe {
  readonly inputs: readonly Tensor[];
  /** Runs the op again; the result has one use. */
  make(): Tensor;
  made: Tensor | undefined;
  /** Recorded calls and other recipes that need it. */
  users: number;
}

/** Keeps `t`, or what it takes to make it again, until {@link letGo}. */
export function save(t: Tensor): Tensor {
  if (t.recipe === undefined) return addUse(t);
  if (t.recipe.users++ === 0) for (const input of t.recipe.inputs) save(input);
  return t;
}

/** The counterpart of {@link save}. */
export function letGo(t: Tensor): void {
  const { recipe } = t;
  if (recipe === undefined) {
    releaseUse(t);
    return;
  }
  if (--recipe.users > 0) return;
  if (recipe.made !== undefined) releaseUse(recipe.made);
  recipe.made = undefined;
  for (const input of recipe.inputs) letGo(input);
}

/** The elements of a saved tensor: itself where it still exists, else made again, once for all who need it. */
export function restore(t: Tensor): Tensor {
  if (t.recipe === undefined || t.held || t.uses > 0) return t;
  t.recipe.made ??= t.recipe.make();
  return t.recipe.made;
}
