/** What the shell and its views know of each other. */

import type { AlertCount, Link } from "./api";

/** What a view gives the shell: `leave` ends it, `key` takes a key that the shell has no use for. */
export interface View {
  title: string;
  leave: () => void;
  key?: (event: KeyboardEvent) => boolean;
}

export interface Shell {
  link: (link: Link | null) => void;
  alerting: (open: AlertCount) => void;
  query: URLSearchParams;
}
