# objects.sh ISA OBJECT... - every symbol that these objects let the linker share with other objects
# is in namespace lc::ISA. The linker could otherwise take an inline function that is compiled here
# for a newer machine as the copy for all objects. A symbol that depends on an unnamed namespace must
# not be shared either, because an unnamed namespace is a different one in each file.
set -eu
isa=$1
shift
local=$(nm -C --defined-only "$@" | awk '$2 ~ /^[WVu]$/' | grep -F "(anonymous namespace)" || true)
if [ -n "$local" ]; then
  echo "Shared, but in an unnamed namespace:"
  echo "$local" | cut -d ' ' -f 2- | sort | uniq -c
  exit 1
fi
shared=$(nm -C --defined-only "$@" | awk '$2 ~ /^[WVu]$/' | grep -v -E -e "^[0-9a-f]+ . (guard variable for |typeinfo for |typeinfo name for |vtable for )?([^(]* )?lc::$isa::" -e " DW\.ref\." || true)
[ -z "$shared" ] && exit 0
echo "Weak or unique symbols outside of lc::$isa:"
echo "$shared" | cut -d ' ' -f 2- | sort | uniq -c
exit 1
