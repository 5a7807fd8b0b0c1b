package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// What becomes of the compressed blobs that layers came as.
const (
	// KeepAuto keeps them while the budget allows, so that a push is bit-exact; they are the first to go.
	KeepAuto = "auto"
	// KeepAlways keeps them as long as their layers.
	KeepAlways = "always"
	// KeepNever drops them when the layer is there.
	KeepNever = "never"
)

// GC bounds what conex keeps without being asked to.
type GC struct {
	// Auto lets pulls, builds and removals make room when a bound is crossed. Nil is true.
	Auto *bool `toml:"auto"`
	// Budget is how much build cache, unused layers and compressed blobs may hold together. Nil is DefaultBudget.
	Budget *Amount `toml:"budget"`
	// MinFree is how much of the file system shall stay free: below it these go, whatever the budget. Nil is DefaultMinFree.
	MinFree *Amount `toml:"min-free"`
}

// The bounds that hold when nothing else is configured.
var (
	DefaultBudget  = Amount{share: 0.10, bytes: 20e9}
	DefaultMinFree = Amount{share: 0.02, bytes: 1e9}
)

// On reports whether conex collects by itself.
func (g GC) On() bool { return g.Auto == nil || *g.Auto }

// Limits returns the two bounds in bytes on a file system of that size.
func (g GC) Limits(total int64) (budget, minFree int64) {
	b, m := DefaultBudget, DefaultMinFree
	if g.Budget != nil {
		b = *g.Budget
	}
	if g.MinFree != nil {
		m = *g.MinFree
	}
	return b.Of(total), m.Of(total)
}

// Amount is a number of bytes ("20GB"), a share of the file system ("10%"), or both ("10%, 20GB"), of which the smaller counts.
type Amount struct {
	share float64 // of 1; 0: none given
	bytes int64   // 0: none given
	zero  bool    // "0" was given
}

// Of returns the amount in bytes on a file system of total bytes.
func (a Amount) Of(total int64) int64 {
	n := int64(math.MaxInt64)
	if a.share > 0 {
		n = int64(a.share * float64(total))
	}
	if a.bytes > 0 {
		n = min(n, a.bytes)
	}
	if a.zero {
		n = 0
	}
	return n
}

// UnmarshalText reads what stands in the configuration file.
func (a *Amount) UnmarshalText(text []byte) error {
	*a = Amount{}
	parts := strings.Split(string(text), ",")
	if len(parts) > 2 {
		return fmt.Errorf("%q: want bytes (20GB), a percentage (10%%), or both with a comma", text)
	}
	for _, p := range parts {
		if err := a.add(strings.TrimSpace(p)); err != nil {
			return fmt.Errorf("%q: %w", text, err)
		}
	}
	return nil
}

func (a *Amount) add(s string) error {
	if p, ok := strings.CutSuffix(s, "%"); ok {
		f, err := strconv.ParseFloat(strings.TrimSpace(p), 64)
		if err != nil || !(f >= 0 && f <= 100) {
			return errors.New("want a percentage between 0% and 100%")
		}
		if a.share > 0 {
			return errors.New("two percentages")
		}
		a.share = f / 100
		a.zero = a.zero || f == 0
		return nil
	}
	n, err := parseBytes(s)
	if err != nil {
		return err
	}
	if a.bytes > 0 {
		return errors.New("two numbers of bytes")
	}
	a.bytes = n
	a.zero = a.zero || n == 0
	return nil
}

// parseBytes reads a number with a unit: kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024.
func parseBytes(s string) (int64, error) {
	wrong := errors.New("want bytes (20GB), a percentage (10%), or both with a comma")
	i := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if i < 0 {
		i = len(s)
	}
	f, err := strconv.ParseFloat(s[:i], 64)
	if err != nil {
		return 0, wrong
	}
	unit := strings.ToLower(strings.TrimSpace(s[i:]))
	base := 1000.0
	if u, ok := strings.CutSuffix(unit, "ib"); ok {
		unit, base = u, 1024
	} else {
		unit = strings.TrimSuffix(unit, "b")
	}
	exp := strings.Index("kmgt", unit)
	switch {
	case unit == "" && base == 1000:
		exp = 0
	case len(unit) != 1 || exp < 0:
		return 0, wrong
	default:
		exp++
	}
	n := f * math.Pow(base, float64(exp))
	if n >= math.MaxInt64 {
		return 0, wrong
	}
	return int64(n), nil
}
