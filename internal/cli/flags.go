package cli

import (
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/pflag"
)

// list is a flag that may be given several times; commas mean nothing in it.
type list []string

func (l *list) Set(s string) error { *l = append(*l, s); return nil }
func (l *list) Type() string       { return "list" }
func (l *list) String() string     { return "" }

// bytesFlag is a number of bytes, with a unit or without: 512m, 1.5g.
type bytesFlag int64

func (b *bytesFlag) Set(s string) error {
	n, err := units.RAMInBytes(s)
	if err != nil {
		return err
	}
	*b = bytesFlag(n)
	return nil
}
func (b *bytesFlag) Type() string   { return "bytes" }
func (b *bytesFlag) String() string { return "" }

// cpusFlag is a number of processors in billionths.
type cpusFlag int64

func (c *cpusFlag) Set(s string) error {
	r, ok := new(big.Rat).SetString(s)
	if !ok {
		return fmt.Errorf("failed to parse %q as a rational number", s)
	}
	nano := new(big.Rat).Mul(r, big.NewRat(1e9, 1))
	if !nano.IsInt() || !nano.Num().IsInt64() {
		return errors.New("value is too precise")
	}
	if nano.Sign() < 0 {
		return errors.New("value is negative")
	}
	*c = cpusFlag(nano.Num().Int64())
	return nil
}
func (c *cpusFlag) Type() string   { return "decimal" }
func (c *cpusFlag) String() string { return "" }

// optInt is a number that may be left out.
type optInt struct{ v *int }

func (o *optInt) Set(s string) error {
	n, err := strconv.Atoi(s)
	if err != nil {
		return err
	}
	o.v = &n
	return nil
}
func (o *optInt) Type() string { return "int" }
func (o *optInt) String() string {
	if o.v == nil {
		return ""
	}
	return strconv.Itoa(*o.v)
}

// refusal says why a flag that Docker has is not taken.
type refusal struct{ name, why string }

func (r *refusal) Error() string { return "--" + r.name + " " + r.why }

// refusedFlag is a flag of Docker's that conex knows and does not take: never ignored, since that would change what runs.
type refusedFlag struct {
	refusal
	kind string
}

func (r *refusedFlag) Set(string) error { return &r.refusal }
func (r *refusedFlag) Type() string     { return r.kind }
func (r *refusedFlag) String() string   { return "" }

func refuse(f *pflag.FlagSet, name, short, kind, why string) {
	sep := "is refused: "
	if why == unsupported {
		sep = ""
	}
	fl := f.VarPF(&refusedFlag{refusal{name, sep + why}, kind}, name, short, "")
	fl.Hidden = true
	if kind == "bool" {
		fl.NoOptDefVal = "true"
	}
}

const unsupported = "is not supported yet"

// refuseAll refuses flags that are not supported yet: names with "name" or "n|name" for a shorthand; those that end in "?"
// are switches without a value.
func refuseAll(f *pflag.FlagSet, names ...string) {
	for _, n := range names {
		kind := "string"
		if s, ok := strings.CutSuffix(n, "?"); ok {
			n, kind = s, "bool"
		}
		short, long, ok := strings.Cut(n, "|")
		if !ok {
			short, long = "", n
		}
		refuse(f, long, short, kind, unsupported)
	}
}

// filterFlag are filters, key=value, each of which may be given several times. Keys are case-insensitive, an empty filter is none.
type filterFlag struct {
	m map[string][]string
	// words lets a filter that is only a word, "shared", mean that it is true.
	words bool
}

func (l *filterFlag) Set(s string) error {
	if s == "" {
		return nil
	}
	k, v, ok := strings.Cut(s, "=")
	switch {
	case !ok && l.words:
		v = "true"
	case !ok:
		return errors.New("bad format of filter (expected name=value)")
	}
	if l.m == nil {
		l.m = map[string][]string{}
	}
	k = strings.ToLower(strings.TrimSpace(k))
	l.m[k] = append(l.m[k], strings.TrimSpace(v))
	return nil
}
func (l *filterFlag) Type() string   { return "filter" }
func (l *filterFlag) String() string { return "" }
