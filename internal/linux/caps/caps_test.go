package caps_test

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"conex/internal/linux/caps"
)

func TestDefaultIsDockers(t *testing.T) {
	want := []string{
		"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
		"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
	}
	got := caps.Default()
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("Default() = %v, want %v", got, want)
	}
	m, err := caps.Mask(want)
	if err != nil {
		t.Fatal(err)
	}
	if m != 0xa80425fb { // the CapBnd of a default Docker container
		t.Errorf("Mask(default) = %#x, want 0xa80425fb", m)
	}
}

func TestAllIsOurBoundingSet(t *testing.T) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "CapBnd:\t")
	if !ok {
		t.Fatal("no CapBnd in /proc/self/status")
	}
	want, err := strconv.ParseUint(strings.Fields(rest)[0], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	got, err := caps.Mask(caps.All())
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("All() = %#x, want the bounding set %#x", got, want)
	}
}

func TestResolve(t *testing.T) {
	without := func(list []string, drop ...string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(c string) bool { return slices.Contains(drop, c) })
	}
	tests := []struct {
		name            string
		base, add, drop []string
		privileged      bool
		want            []string
	}{
		{name: "nothing asked", base: caps.Default(), want: caps.Default()},
		{name: "drop", base: caps.Default(), drop: []string{"chown", "CAP_KILL"}, want: without(caps.Default(), "CAP_CHOWN", "CAP_KILL")},
		{name: "drop all", base: caps.Default(), drop: []string{"all"}, want: []string{}},
		{name: "drop all, add one", base: caps.Default(), drop: []string{"ALL"}, add: []string{"Net_Bind_Service"}, want: []string{"CAP_NET_BIND_SERVICE"}},
		{name: "add all, drop one", base: caps.Default(), add: []string{"ALL"}, drop: []string{"SYS_CHROOT"}, want: without(caps.All(), "CAP_SYS_CHROOT")},
		{name: "add all, drop all: add wins", base: caps.Default(), add: []string{"ALL"}, drop: []string{"ALL"}, want: caps.All()},
		{name: "the same in both: add wins", base: caps.Default(), add: []string{"CHOWN"}, drop: []string{"CHOWN"}, want: caps.Default()},
		{name: "twice", base: []string{"CAP_CHOWN"}, add: []string{"CHOWN", "cap_chown"}, want: []string{"CAP_CHOWN"}},
		{name: "privileged", base: caps.Default(), drop: []string{"ALL"}, privileged: true, want: caps.All()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := caps.Resolve(tt.base, tt.add, tt.drop, tt.privileged)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}

func TestResolveErrors(t *testing.T) {
	_, err := caps.Resolve(caps.Default(), []string{"foo"}, nil, false)
	if !errors.Is(err, caps.ErrUnknown) || err.Error() != `invalid CapAdd: unknown capability: "CAP_FOO"` {
		t.Errorf("add foo: %v", err)
	}
	_, err = caps.Resolve(caps.Default(), nil, []string{"CAP_BAR"}, false)
	if !errors.Is(err, caps.ErrUnknown) || err.Error() != `invalid CapDrop: unknown capability: "CAP_BAR"` {
		t.Errorf("drop bar: %v", err)
	}
	missing := caps.Names(^caps.Available())
	if len(missing) == 0 {
		t.Skip("this process has every capability that exists, so none can be unavailable")
	}
	_, err = caps.Resolve(caps.Default(), missing[:1], nil, false)
	if !errors.Is(err, caps.ErrUnavailable) || !strings.Contains(err.Error(), missing[0]) {
		t.Errorf("add %s: %v", missing[0], err)
	}
}
