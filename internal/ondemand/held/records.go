//go:build go1.26 && !go1.27

package held

import _ "unsafe" // for go:linkname

var all = [...]Library{Digest, Dockerfile, SSH, Compress}

// Digest is what go-digest needs for any algorithm: ocispec does without for sha256.
var Digest = Library{
	{Path: "github.com/opencontainers/go-digest", record: &godigest},
}

// Dockerfile is BuildKit's Dockerfile parser, and protobuf, which it brings for stacks in errors.
var Dockerfile = Library{
	{Path: "github.com/moby/buildkit/frontend/dockerfile/command", record: &command},
	{Path: "google.golang.org/protobuf/internal/detrand", record: &detrand},
	{Path: "google.golang.org/protobuf/internal/errors", record: &errors},
	{Path: "google.golang.org/protobuf/encoding/protowire", record: &protowire},
	{Path: "google.golang.org/protobuf/reflect/protoreflect", record: &protoreflect},
	{Path: "google.golang.org/protobuf/reflect/protoregistry", record: &protoregistry},
	{Path: "google.golang.org/protobuf/proto", record: &proto},
	{Path: "google.golang.org/protobuf/internal/encoding/text", record: &text},
	{Path: "google.golang.org/protobuf/internal/filedesc", record: &filedesc},
	{Path: "google.golang.org/protobuf/encoding/prototext", record: &prototext},
	{Path: "google.golang.org/protobuf/internal/encoding/tag", record: &tag},
	{Path: "google.golang.org/protobuf/internal/impl", record: &impl},
	{Path: "google.golang.org/protobuf/internal/filetype", record: &filetype},
	{Path: "google.golang.org/protobuf/types/known/anypb", record: &anypb},
	{Path: "github.com/containerd/typeurl/v2", record: &typeurl},
	{Path: "github.com/planetscale/vtprotobuf/protohelpers", record: &protohelpers},
	{Path: "github.com/moby/buildkit/util/stack", record: &stack},
	{Path: "github.com/moby/buildkit/frontend/dockerfile/parser", record: &parser},
	{Path: "github.com/moby/buildkit/frontend/dockerfile/instructions", record: &instructions},
}

// SSH is agents and private keys.
var SSH = Library{
	{Path: "golang.org/x/crypto/cryptobyte", record: &cryptobyte},
	{Path: "golang.org/x/crypto/curve25519", record: &curve25519},
	{Path: "golang.org/x/crypto/ssh", record: &ssh},
	{Path: "golang.org/x/crypto/ssh/agent", record: &agent},
}

// Compress is gzip, zstd and xz, which make tables and errors, and ask the processor what it can.
var Compress = Library{
	{Path: "github.com/klauspost/compress/flate", record: &flate},
	{Path: "github.com/klauspost/compress/internal/cpuinfo", record: &cpuinfo},
	{Path: "github.com/klauspost/compress/internal/snapref", record: &snapref},
	{Path: "github.com/klauspost/compress/zstd", record: &zstd},
	{Path: "github.com/ulikunitz/xz/internal/xlog", record: &xlog},
	{Path: "github.com/ulikunitz/xz/lzma", record: &lzma},
	{Path: "github.com/klauspost/compress/gzip", record: &gzip},
}

//go:linkname godigest github.com/opencontainers/go-digest..inittask
var godigest record

//go:linkname command github.com/moby/buildkit/frontend/dockerfile/command..inittask
var command record

//go:linkname detrand google.golang.org/protobuf/internal/detrand..inittask
var detrand record

//go:linkname errors google.golang.org/protobuf/internal/errors..inittask
var errors record

//go:linkname protowire google.golang.org/protobuf/encoding/protowire..inittask
var protowire record

//go:linkname protoreflect google.golang.org/protobuf/reflect/protoreflect..inittask
var protoreflect record

//go:linkname protoregistry google.golang.org/protobuf/reflect/protoregistry..inittask
var protoregistry record

//go:linkname proto google.golang.org/protobuf/proto..inittask
var proto record

//go:linkname text google.golang.org/protobuf/internal/encoding/text..inittask
var text record

//go:linkname filedesc google.golang.org/protobuf/internal/filedesc..inittask
var filedesc record

//go:linkname prototext google.golang.org/protobuf/encoding/prototext..inittask
var prototext record

//go:linkname tag google.golang.org/protobuf/internal/encoding/tag..inittask
var tag record

//go:linkname impl google.golang.org/protobuf/internal/impl..inittask
var impl record

//go:linkname filetype google.golang.org/protobuf/internal/filetype..inittask
var filetype record

//go:linkname anypb google.golang.org/protobuf/types/known/anypb..inittask
var anypb record

//go:linkname typeurl github.com/containerd/typeurl/v2..inittask
var typeurl record

//go:linkname protohelpers github.com/planetscale/vtprotobuf/protohelpers..inittask
var protohelpers record

//go:linkname stack github.com/moby/buildkit/util/stack..inittask
var stack record

//go:linkname parser github.com/moby/buildkit/frontend/dockerfile/parser..inittask
var parser record

//go:linkname instructions github.com/moby/buildkit/frontend/dockerfile/instructions..inittask
var instructions record

//go:linkname cryptobyte golang.org/x/crypto/cryptobyte..inittask
var cryptobyte record

//go:linkname curve25519 golang.org/x/crypto/curve25519..inittask
var curve25519 record

//go:linkname ssh golang.org/x/crypto/ssh..inittask
var ssh record

//go:linkname agent golang.org/x/crypto/ssh/agent..inittask
var agent record

//go:linkname snapref github.com/klauspost/compress/internal/snapref..inittask
var snapref record

//go:linkname flate github.com/klauspost/compress/flate..inittask
var flate record

//go:linkname cpuinfo github.com/klauspost/compress/internal/cpuinfo..inittask
var cpuinfo record

//go:linkname zstd github.com/klauspost/compress/zstd..inittask
var zstd record

//go:linkname xlog github.com/ulikunitz/xz/internal/xlog..inittask
var xlog record

//go:linkname lzma github.com/ulikunitz/xz/lzma..inittask
var lzma record

//go:linkname gzip github.com/klauspost/compress/gzip..inittask
var gzip record
