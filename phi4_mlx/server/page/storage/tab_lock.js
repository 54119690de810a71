/** Which conversations are being answered in which tab, by locks that the browser releases when a tab is closed. */

const nameOf = (id) => `phi4_mlx.answering.${id}`;

/**
 * Shows the other tabs that this one is answering a conversation.
 * @param {string} id
 * @param {Promise<unknown>} done the end of the answer
 */
export function holdUntil(id, done) {
  navigator.locks?.request(nameOf(id), () => done); // missing over plain http from another machine
}

/**
 * The end of the answer that another tab is generating for a conversation.
 * @param {string} id
 * @returns {Promise<{end: Promise<void>} | null>} null if no other tab is at it
 */
export async function endElsewhere(id) {
  const { held = [] } = (await navigator.locks?.query()) ?? {};
  if (!held.some(({ name }) => name === nameOf(id))) return null;
  return { end: navigator.locks.request(nameOf(id), () => {}) };
}
