package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"conex/internal/portmap"
)

// A table of iptables-legacy is replaced as a whole by whoever changes it, under a lock of its programs' own. So its own program does it for us, where
// it is installed; where it is not, nobody could have set the policy but another program, and the audit says what is missing.

// speakLegacy is portmap.Pass for iptables-legacy, and reports for which bridges it had to. The caller holds the table's lock.
func speakLegacy(ctx context.Context, bridges []string) (changed []string, err error) {
	missing, err := portmap.LegacyForward(bridges)
	if err != nil {
		return nil, err
	}
	for command, list := range missing {
		for _, b := range list {
			// What stands of an earlier hand goes first: two rules, at the end.
			if err := withdrawLegacy(ctx, command, b); err != nil {
				return changed, err
			}
			for _, r := range portmap.LegacyRules(b) {
				switch err := iptables(ctx, command, "-A", r); {
				case errors.Is(err, exec.ErrNotFound):
					return changed, nil
				case err != nil:
					return changed, fmt.Errorf("let packets of %s pass: %w", b, err)
				}
			}
			if !slices.Contains(changed, b) {
				changed = append(changed, b)
			}
		}
	}
	return changed, nil
}

// unspeakLegacy takes back what speakLegacy did for a bridge. Idempotent.
func unspeakLegacy(ctx context.Context, bridge string) error {
	commands, err := portmap.LegacyPassed(bridge)
	if err != nil {
		return err
	}
	for _, c := range commands {
		if err := withdrawLegacy(ctx, c, bridge); err != nil {
			return err
		}
	}
	return nil
}

func withdrawLegacy(ctx context.Context, command, bridge string) error {
	for _, r := range portmap.LegacyRules(bridge) {
		if iptables(ctx, command, "-C", r) != nil {
			continue // there is none, or nobody who could say so
		}
		if err := iptables(ctx, command, "-D", r); err != nil {
			return fmt.Errorf("take back the rules of %s: %w", bridge, err)
		}
	}
	return nil
}

// iptables runs the host's iptables-legacy or ip6tables-legacy with a rule of the filter table. exec.ErrNotFound where it is not installed.
func iptables(ctx context.Context, command, what string, rule []string) error {
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/", "/usr/bin/"} {
		if _, err := os.Stat(dir + command); err != nil {
			continue
		}
		cmd := exec.CommandContext(ctx, dir+command, append([]string{"-w", "5", "-t", "filter", what}, rule...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			said, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
			return fmt.Errorf("%s %s %s: %w: %s", command, what, strings.Join(rule, " "), err, said)
		}
		return nil
	}
	return exec.ErrNotFound
}
