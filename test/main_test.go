// Package test runs the whole of conex on the real kernel: the scenarios of the issue, and scripts that read like a terminal.
package test

import (
	"fmt"
	"os"
	"testing"

	"conex/internal/ondemand"
)

// TestMain gives the tests one temporary folder, so that what is left at the end can be told from other people's.
func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) (code int) {
	ondemand.Compress()
	ondemand.Digest()
	base, err := os.MkdirTemp("", "conex-suite.")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := os.Setenv("TMPDIR", base); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code = m.Run()
	if left := suiteLeaks(base); len(left) > 0 {
		for _, l := range left {
			fmt.Fprintln(os.Stderr, "left behind by the suite:", l)
		}
		return max(code, 1)
	}
	if err := os.RemoveAll(base); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}
