/** What the browser keeps for its user from visit to visit. One that keeps nothing (cookies are blocked) refuses even to be asked. */

export function kept(key: string): string | null {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

/** null = no more. */
export function keep(key: string, value: string | null): void {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // for this visit alone
  }
}
