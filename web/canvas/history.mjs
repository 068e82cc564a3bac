// Undo and redo. States are never changed in place, so keeping one costs a reference.

const MOST_STEPS = 500;

export class History {
  constructor(state) {
    this.reset(state);
  }

  reset(state) {
    this.states = [state];
    this.at = 0;
    this.topic = null;
  }

  /** Go on from one of the states of an earlier history. */
  resume(states, at) {
    [this.states, this.at, this.topic] = [[...states], at, null];
  }

  get state() {
    return this.states[this.at];
  }

  /** A new state. Successive ones of one `topic` (typing into one field, say) count as one step. */
  push(state, topic = null) {
    const joins = topic !== null && topic === this.topic && this.at > 0;
    this.states.length = joins ? this.at : this.at + 1;
    this.states.push(state);
    if (this.states.length > MOST_STEPS + 1) this.states.shift();
    this.at = this.states.length - 1;
    this.topic = topic;
  }

  /** Go `by` steps on (negative: back); whether there was anywhere to go. */
  step(by) {
    const at = Math.max(0, Math.min(this.states.length - 1, this.at + by));
    if (at === this.at) return false;
    this.at = at;
    this.topic = null;
    return true;
  }

  get canUndo() {
    return this.at > 0;
  }

  get canRedo() {
    return this.at < this.states.length - 1;
  }
}
