package plainjson

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"strconv"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// byValue and byAddress encode themselves, the one always, the other where it has an address.
type byValue struct{ n int }

func (b byValue) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, ` { "<value>" : %d } `, b.n), nil
}

type byAddress struct{ N int }

func (b *byAddress) MarshalJSON() ([]byte, error) { return fmt.Appendf(nil, `"address %d"`, b.N), nil }

type byText string

func (b byText) MarshalText() ([]byte, error) { return []byte("<" + string(b) + ">"), nil }

type failing struct{}

func (failing) MarshalJSON() ([]byte, error) { return nil, fmt.Errorf("no") }

type zeroByPointer struct{ N int }

func (z *zeroByPointer) IsZero() bool { return z.N == 1 }

// told has what is encoded in some way of its own.
type told struct {
	all
	V       byValue
	A       byAddress
	List    []byAddress
	ByName  map[string]byAddress
	Pointer *byAddress
	Text    byText
	Texts   map[byText]byText
	Any     []any
	Number  json.Number
	Int     int               `json:",omitempty"`
	Slice   []string          `json:"slice,omitempty"`
	Struct  struct{ X int }   `json:",omitempty"`
	Array   [0]int            `json:",omitempty"`
	Face    any               `json:",omitempty"`
	Zero    time.Time         `json:",omitzero"`
	ZeroIP  netip.Addr        `json:"ip,omitzero"`
	ZeroP   *int              `json:",omitzero"`
	Map     map[string]string `json:",omitzero"`
	hidden  int
}

type zeroed struct {
	Z zeroByPointer  `json:",omitzero"`
	P *zeroByPointer `json:",omitzero"`
}

type loop struct{ Next *loop }

func sameBack(t *testing.T, v any) {
	t.Helper()
	got, err := Marshal(v)
	want, werr := json.Marshal(v)
	if fmt.Sprint(err) != fmt.Sprint(werr) || !bytes.Equal(got, want) {
		t.Errorf("%T: %v\n%s, want %v\n%s", v, err, got, werr, want)
	}
	got, err = MarshalIndent(v, "  ")
	want, werr = json.MarshalIndent(v, "", "  ")
	if fmt.Sprint(err) != fmt.Sprint(werr) || !bytes.Equal(got, want) {
		t.Errorf("%T indented: %v\n%s, want %v\n%s", v, err, got, werr, want)
	}
	for _, indent := range []string{"", "    "} {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		e.SetIndent("", indent)
		werr = e.Encode(v)
		got, err = Print(v, indent)
		if fmt.Sprint(err) != fmt.Sprint(werr) || werr == nil && string(got)+"\n" != b.String() {
			t.Errorf("%T printed: %v\n%s, want %v\n%s", v, err, got, werr, &b)
		}
	}
}

// fill gives every field, at any depth, a value that is not its zero; n counts them.
func fill(v reflect.Value, n *int, depth int) {
	*n++
	if depth > 8 || !v.CanSet() {
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n, depth+1)
	case reflect.Struct:
		switch v.Interface().(type) {
		case time.Time:
			v.Set(reflect.ValueOf(time.Unix(int64(*n), 5).UTC()))
		case netip.Addr:
			v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{10, 0, 0, byte(*n)})))
		}
		for i := range v.NumField() {
			fill(v.Field(i), n, depth+1)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0), n, depth+1)
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), n, depth+1)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 3 {
			k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(k, n, depth+1)
			fill(e, n, depth+1)
			v.SetMapIndex(k, e)
		}
	case reflect.String:
		v.SetString([]string{"a", "<&>", "é\n", "\"\\", "\xff", "\u2028", "\x7f"}[*n%7] + strconv.Itoa(*n*7919%1000))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(-int64(*n % 100))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n % 100))
	case reflect.Float32, reflect.Float64:
		v.SetFloat(float64(*n) + 0.5)
	}
}

// TestSameBack: whatever the value, the text and the error are encoding/json's.
func TestSameBack(t *testing.T) {
	for _, v := range []any{
		nil, 1, "x", "<a>", []byte("x"), []byte(nil), []string(nil), []string{}, map[string]int(nil), map[string]int{}, (*int)(nil), [2]bool{true},
		all{}, &all{}, told{}, &told{}, ambiguous{}, shadowing{}, specs.Spec{}, container.InspectResponse{}, &container.HostConfig{},
		map[name]any{"b": 1.5, "a": nil, "<": []any{map[string]any{"x": json.Number("1e3")}}}, map[int]string{2: "a", 10: "b"},
		byAddress{1}, &byAddress{2}, []byAddress{{3}}, map[string]byAddress{"x": {4}}, byValue{5}, []any{byAddress{6}, &byAddress{7}, byValue{8}},
		&told{Pointer: &byAddress{9}, List: []byAddress{{1}}, ByName: map[string]byAddress{"x": {1}}, Text: "t", Texts: map[byText]byText{"k": "v"},
			Any: []any{byText("x"), nil}, Number: "12", Int: 1, Face: 0, Zero: time.Unix(1, 0).UTC(), ZeroP: new(int), Map: map[string]string{}, hidden: 1},
		zeroed{}, zeroed{Z: zeroByPointer{1}, P: &zeroByPointer{1}}, &zeroed{Z: zeroByPointer{1}, P: &zeroByPointer{2}},
		math.NaN(), []any{1, math.Inf(1)}, failing{}, []failing{{}}, make(chan int), func() {}, struct{ F func() }{}, struct{ C complex64 }{}, json.Number("x"),
	} {
		sameBack(t, v)
	}
	l := &loop{}
	l.Next = l
	if _, err := Marshal(l); err == nil {
		t.Error("no error for what contains itself")
	}
	deep := &loop{}
	for range 2 * maxDepth {
		deep = &loop{deep}
	}
	sameBack(t, deep)
	for _, v := range []any{&all{}, &told{}, &shadowing{}, &ambiguous{}, &specs.Spec{}, &container.InspectResponse{}, &container.HostConfig{}, &container.Config{}} {
		n := 0
		fill(reflect.ValueOf(v).Elem(), &n, 0)
		if n < 3 {
			t.Errorf("%T has %d values only", v, n)
		}
		sameBack(t, v)
		sameBack(t, reflect.ValueOf(v).Elem().Interface())
	}
}

// TestSameBackOfTexts: what a text holds goes back as with encoding/json.
func TestSameBackOfTexts(t *testing.T) {
	for _, text := range texts {
		for _, v := range []any{new(all), new(ambiguous), new(shadowing), new(specs.Spec), new(any)} {
			if json.Unmarshal([]byte(text), v) == nil {
				sameBack(t, v)
			}
		}
	}
}

// TestPlainBack: what conex writes needs no plans of encoding/json's.
func TestPlainBack(t *testing.T) {
	type detail struct { // as the engine's
		container.InspectResponse
		NetworkSettings int
	}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[specs.Spec](), reflect.TypeFor[container.InspectResponse](), reflect.TypeFor[container.HostConfig](), reflect.TypeFor[container.Config](),
		reflect.TypeFor[container.NetworkSettings](), reflect.TypeFor[detail](), reflect.TypeFor[shadowing](),
	} {
		if i := infoOf(typ); !i.plain || i.ownText {
			t.Errorf("%v is not plain", typ)
		}
	}
}

func FuzzSameBack(f *testing.F) {
	for _, text := range texts {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, v := range []any{new(all), new(specs.Spec), new(any)} {
			if json.Unmarshal([]byte(text), v) == nil {
				sameBack(t, v)
			}
		}
	})
}
