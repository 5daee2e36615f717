// Asks the pack's own routes of ComfyUI's server, which only read.

import { api } from "../../scripts/api.js";

/**
 * @param {string} route the name after /klein_cns/
 * @param {Record<string, unknown>} values what the route takes
 * @returns {Promise<any>} its answer; {error: a sentence} where it refuses the values; null where there is no such route
 */
export async function ask(route, values = {}) {
  try {
    const query = encodeURIComponent(JSON.stringify(values));
    const answer = await api.fetchApi(`/klein_cns/${route}?values=${query}`);
    return answer.ok || answer.status === 400 ? await answer.json() : null;
  } catch {
    return null; // the server is gone, and ComfyUI says so itself
  }
}
