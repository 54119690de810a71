/** A signal: functions that are called each time something happens. */
export class Signal {
  #listeners = new Set();

  /**
   * Calls a function each time from now on.
   * @param {(value: any) => void} listener
   * @returns {() => void} ends it
   */
  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Calls all listeners with a value. */
  tell(value) {
    for (const listener of [...this.#listeners]) listener(value);
  }
}
