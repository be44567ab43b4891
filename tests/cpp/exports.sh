# exports.sh LIBRARY LIST - the library exports exactly the symbols of the list.
set -eu
exported=$(nm -D --defined-only "$1" | awk '$2 != "A" { print $3 }' | LC_ALL=C sort)
[ "$exported" = "$(cat "$2")" ] && exit 0
echo "The exported symbols (+) are not those of $2 (-):"
echo "$exported" | diff -u "$2" - | tail -n +4
exit 1
